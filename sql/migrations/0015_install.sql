-- What `cdcbridge uninstall` takes back, and what `cdcbridge status` tells of a bridge that has failed.

-- Tables of the source that got REPLICA IDENTITY FULL from the event trigger, kept when the trigger is removed.
-- before: pg_class.relreplident as it was.
create table given_identities (
    relation oid  primary key,
    before   text not null
);

-- The last error of a bridge, unless the store was out of reach. holder: the host and the process.
create table last_error (
    only_row boolean     primary key default true check (only_row),
    message  text        not null,
    hint     text,
    holder   text        not null,
    at       timestamptz not null default clock_timestamp()
);
