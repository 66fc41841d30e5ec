-- partition_of(key, partitions): compute the partition of a key.
--
-- It is the CRC-32 (ISO 3309, as in zlib) of the key's UTF-8 bytes, modulo the number of
-- partitions. The CRC is computed four bits at a time, with a table of 16 entries.
--
-- Parameters:
--   key         the key of messages in the log, or null
--   partitions  the number of partitions, store.partitions of the configuration
-- Returns: the number of the partition, from 0. A null key is in partition 0.
-- Example:
--   select cdcbridge.partition_of('42', 16);
create or replace function partition_of(key text, partitions int) returns int
language plpgsql immutable set search_path from current as $$
declare
    steps constant bigint[] :=
        '[0:15]={0,498536548,997073096,651767980,1994146192,1802195444,1303535960,1342533948,
        3988292384,4027552580,3604390888,3412177804,2607071920,2262029012,2685067896,3183342108}';
    bytes constant bytea := convert_to(key, 'UTF8');
    crc bigint := 4294967295;
begin
    if key is null then
        return 0;
    end if;
    for i in 0 .. length(bytes) - 1 loop
        crc := crc # get_byte(bytes, i);
        crc := (crc >> 4) # steps[(crc & 15)::int];
        crc := (crc >> 4) # steps[(crc & 15)::int];
    end loop;
    return ((crc # 4294967295) % partitions)::int;
end $$;
