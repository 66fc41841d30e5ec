-- seek(consumer, target, partition): move a group's offset to another place in the log.
--
-- The target 'earliest' is the first message that the log still has, and 'latest' skips all
-- messages up to now. A seq is the next message to read. A time is written as in time_of(). The
-- target may also be a number or a timestamptz.
--
-- A time means the first message that was committed at this time or later. The commit time of a
-- published message is not known. Some messages that were committed shortly before may therefore be
-- read too, but none is missed.
--
-- Leases end, so a member that had leased the partition can no longer commit with its receipt
-- (CB006).
--
-- Parameters:
--   consumer   the name of a stream consumer
--   target     earliest, latest, a seq or a time, see above
--   partition  the number of the partition, or null for all partitions of the group
-- Returns: the number of partitions that were moved.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream
--   CB004  target is none of these, or after the log's end, or before its beginning
--   CB004  the log has no such partition
--   CB005  the isolation level is above READ COMMITTED
--   CB008  the caller may not read this consumer
-- Locks: the partitions. The call waits for transactions that read them, as long as the session's
-- lock_timeout allows. While it waits for one partition it holds no other.
-- Example:
--   select cdcbridge.seek('audit', now() - interval '1 hour');
create or replace function seek(consumer text, target text, partition int default null) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
begin
    return (select count(*) from seek_partitions(consumer, target, partition));
end $$;

-- seek(consumer, target, partition): Do the same for a time.
create or replace function seek(consumer text, target timestamptz, partition int default null)
returns int
language plpgsql volatile security definer
set search_path from current set timezone = 'UTC' set datestyle = 'ISO, MDY' as $$
begin
    return seek(consumer, target::text, partition);
end $$;

-- seek(consumer, target, partition): Do the same for a seq.
create or replace function seek(consumer text, target bigint, partition int default null)
returns int
language plpgsql volatile security definer set search_path from current as $$
begin
    return seek(consumer, target::text, partition);
end $$;
