-- Publishers whose snapshot is older than the last change of consumers must know of it.

-- The transaction that last added, changed or removed a consumer. A sequence, because every session sees its value as it is now,
-- whatever its snapshot.
create sequence consumers_xid_seq;

-- They have a parameter now; two of one name would be ambiguous.
drop function if exists create_segments(), create_partition_indexes();
