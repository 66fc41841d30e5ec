-- Which consumers the bridge that leads feeds, so that one that gets nothing can be named.

-- feeds: written when a session begins to stream (cdcbridge/routing/feeds.py); null before the first one.
alter table source add feeds jsonb;
