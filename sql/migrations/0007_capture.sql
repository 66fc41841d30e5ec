-- What the bridge relies on in the source's catalogue, so that it notices what changed while it was away.

-- database_oid: stays the same when the database is renamed; null in a store that began before this was kept.
-- capture: the publications and the named tables as they were when the last session began (cdcbridge/source/capture.py).
alter table source add database_oid bigint, add capture jsonb;
