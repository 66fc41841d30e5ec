-- seek(consumer, target, partition) -> how many partitions were moved (null: all of the group). target: 'earliest' (what the log
-- still holds), 'latest' (what comes from now on), a seq (the next to be read), or a time as time_of() takes it (what was committed
-- then or later; seq_at() says what that means). Also with a timestamptz or a number: seek('audit', now() - interval '1 hour').
-- Leases end: a commit under one is refused.
-- Raises CB001, CB002, CB004 (a target that is none of these, lies ahead of the log, or before what it still holds), CB008.
-- Locks: the partitions; waits for transactions that read them, as long as the session's lock_timeout allows. While it waits for one
-- partition it holds no other.
create or replace function seek(consumer text, target text, partition int default null) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    return (select count(*) from seek_partitions(consumer, target, partition));
end $$;

-- seek(consumer, target, partition) -> the same, for a time.
create or replace function seek(consumer text, target timestamptz, partition int default null) returns int
language plpgsql volatile security definer set search_path from current set timezone = 'UTC' set datestyle = 'ISO, MDY' as $$
begin
    return seek(consumer, target::text, partition);
end $$;

-- seek(consumer, target, partition) -> the same, for a seq.
create or replace function seek(consumer text, target bigint, partition int default null) returns int
language plpgsql volatile security definer set search_path from current as $$
begin
    return seek(consumer, target::text, partition);
end $$;
