-- browse_log(topic, key, from_seq, from_time, at_most, newest_first): show messages of the log.
--
-- One call looks at 100,000 messages at most, so it is quick also if few of them match. If there
-- may be more, the last row has a seq alone: the from_seq with which the next call continues. A
-- page can therefore be empty although a later page is not.
--
-- The history of a key is quicker than other searches if a group exists: its index leads to the
-- messages of the key's partition, and the call looks at 100,000 of these.
--
-- Messages of open transactions are missing. When such a transaction commits, its messages can
-- appear before others that a call has shown.
--
-- Parameters:
--   topic         only messages of this topic, for example public.orders, or null for all
--   key           only messages with this key, or null for all
--   from_seq      the first seq to look at, or null for the newest one (the oldest one if
--                 newest_first is false)
--   from_time     as from_seq: the last message that was appended at this time or before (the first
--                 one at this time or after). It is compared with inserted_at. Only one of both
--                 may be given.
--   at_most       the most messages to return, 1 to 10,000, default 50
--   newest_first  the order, default true
-- Returns: one row per message, and perhaps a row with a seq alone.
--   commit_lsn, ordinal  the position in the source, or null for a published message
--   inserted_at          when the message was appended to the log
-- Raises:
--   CB004  at_most is out of range, or both from_seq and from_time are given
--   CB008  the caller may not read the table messages
-- Example:
--   select seq, data from cdcbridge.browse_log(topic => 'public.orders', key => '17');
create or replace function browse_log(topic text default null, key text default null,
                                      from_seq bigint default null,
                                      from_time timestamptz default null, at_most int default 50,
                                      newest_first boolean default true)
returns setof logged
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    most constant int := 100000;
    start constant bigint := coalesce(from_seq, seq_appended(from_time, newest_first),
        case when newest_first then 9223372036854775807 else 0 end);
    direction constant text := case when newest_first then 'desc' else 'asc' end;
    candidates constant text := format(
        'from messages m where m.seq %s $1 %s order by m.seq %s',
        case when newest_first then '<=' else '>=' end,
        'and m.partition = ' || indexed_partition(browse_log.key), direction);
    message logged;
    shown int := 0;
    next bigint;
begin
    perform refuse_browsing();
    if (at_most between 1 and 10000) is not true then
        raise exception 'at_most is %, but must be 1 to 10000', coalesce(at_most::text, 'null')
            using errcode = 'CB004';
    elsif from_seq is not null and from_time is not null then
        raise exception 'from_seq is % and from_time is %, but only one of them may be given',
            from_seq, from_time using errcode = 'CB004';
    end if;
    for message in execute format(
        'select m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
         from (select m.* %s limit $2) m
         where ($3 is null or m.topic = $3) and ($4 is null or m.key = $4)
         order by m.seq %s limit $5', candidates, direction)
        using start, most, browse_log.topic, browse_log.key, at_most
    loop
        shown := shown + 1;
        return next message;
    end loop;
    if shown = at_most then
        execute format('select m.seq %s offset 1 limit 1', candidates) into next
        using message.seq;
    else
        execute format('select m.seq %s offset $2 limit 1', candidates) into next using start, most;
    end if;
    if next is not null then
        message := null;
        message.seq := next;
        return next message;
    end if;
end $$;
