-- Compaction keeps each key's latest message, so it has to know of the keys that updates took away.

-- old_key: where an update changed the key, the one that the row had before.
alter table messages add old_key text;

-- Those whose arguments are others now come back with this version's code.
drop function if exists seq_before(text), begin_group(int, text);
