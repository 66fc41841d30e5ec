-- Dead letters and replayed messages that return to their queue.

-- bring_back(consumer, chosen) -> the number of these dead letters that returned to the end of the
-- queue. The caller has locked them.
--
-- A dead letter remains if its message waits or is in flight. A NOTICE reports how many did.
-- Locks: the gap guard's lock of messages_seq, to the end of the transaction.
create or replace function bring_back(consumer consumers, chosen bigint[]) returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c constant consumers := consumer;
    revived int;
begin
    perform register_sequence_transaction();
    with back as (
        insert into redriven (consumer_id, seq, topic, key, data, commit_lsn, ordinal, commit_time,
                              inserted_at, ord, tie)
        select d.consumer_id, d.seq, d.topic, d.key, d.data, d.commit_lsn, d.ordinal, d.commit_time,
               d.inserted_at, greatest(1, (select last_value from messages_seq)),
               nextval('redrives_seq')
        from (select * from dead_messages d where d.consumer_id = c.id and d.id = any (chosen)
                and d.seq not in (select u.seq from leases l cross join lateral
                                      unsettled(c.id, l.claim_id, l.part, l.seqs, null) u
                                  where l.consumer_id = c.id)
                and not exists (select from delayed l where l.consumer_id = c.id and l.seq = d.seq)
              order by d.seq, d.id offset 0) d
        on conflict do nothing
        returning seq, key, ord, tie, topic, data
    ), tail as (
        insert into waiting (consumer_id, ord, tie, seqs, keys, barrier)
        select c.id, b.ord, b.tie, array[b.seq], array[b.key],
               c.mode = 'fifo' and op_of(b.data) = 'truncate'
        from back b
        returning seqs[1] as seq)
    -- With a hash fence.
    delete from dead_messages d
    where d.consumer_id = c.id and d.id = any (chosen)
      and case when true then d.seq in (select t.seq from tail t) end;
    get diagnostics revived = row_count;
    if revived < cardinality(chosen) then
        raise notice '% of % dead letters remain, because their messages already wait or are in '
            'flight', cardinality(chosen) - revived, cardinality(chosen);
    end if;
    perform pg_notify(store_schema(), c.id::text);
    return revived;
end $$;

-- replay_messages(consumer_id, chosen, keys, own_seqs, documents): Put these messages of the log at
-- the end of the queue once more.
--
-- They keep their order, are marked as replayed, and their deliver_count begins anew. Messages that
-- wait or are in flight are skipped. Like redriven messages, replayed ones carry their data with
-- them.
-- Parameters:
--   keys                 the keys of the messages, or null for those of the log
--   own_seqs, documents  data that replaces the data of the log for the messages own_seqs, as in
--                        keep_own()
-- Returns: how many messages were replayed, and how many were skipped
-- Raises:
--   CB001  the consumer was removed
-- Locks: the row of the consumer, FOR SHARE, and the gap guard's lock of messages_seq, both to the
-- end of the transaction.
create or replace function replay_messages(consumer_id int, chosen bigint[], keys text[],
                                           own_seqs bigint[], documents text[],
                                           out replayed int, out skipped int)
language plpgsql volatile
set search_path from current set jit = off as $$
declare
    c consumers;
begin
    select * into c from consumers where id = replay_messages.consumer_id for share;
    if not found then
        raise exception 'the consumer with the id % was removed', replay_messages.consumer_id
            using errcode = 'CB001';
    end if;
    perform register_sequence_transaction();
    with wanted as materialized (
        select u.seq, u.key, u.n from unnest(chosen, keys) with ordinality as u (seq, key, n)
        where u.seq not in (
            select u.seq from consumer_messages u
            where u.consumer_id = c.id and u.seq between chosen[1] and chosen[cardinality(chosen)])
    ), again as (
        insert into redriven (consumer_id, seq, topic, key, data, commit_lsn, ordinal, commit_time,
                              inserted_at, ord, tie, replayed)
        select c.id, m.seq, m.topic, m.own_key, coalesce(m.document::json, m.data), m.commit_lsn,
               m.ordinal, m.commit_time, m.inserted_at,
               greatest(1, (select last_value from messages_seq)), nextval('redrives_seq'), true
        from (select m.*, case when keys is null then m.key else w.key end as own_key, o.document
              from wanted w join messages m on m.seq = w.seq
              left join unnest(own_seqs, documents) as o (seq, document) on o.seq = w.seq
              order by w.n offset 0) m
        on conflict do nothing
        returning seq, key, ord, tie, data
    )
    insert into waiting (consumer_id, ord, tie, seqs, keys, barrier)
    select c.id, a.ord, a.tie, array[a.seq], array[a.key],
           c.mode = 'fifo' and op_of(a.data) = 'truncate'
    from again a;
    get diagnostics replayed = row_count;
    skipped := cardinality(chosen) - replayed;
    perform pg_notify(store_schema(), c.id::text);
end $$;

-- refuse_unknown_dead(consumer, ids): Raise an error for an id that is not the id of a dead letter
-- of this consumer.
--
-- If such a number is the seq of a dead letter, the hint names the id of that dead letter, for
-- example id 1 for seq 61.
-- Raises:
--   CB007  there is no dead letter with one of these ids
create or replace function refuse_unknown_dead(consumer consumers, ids bigint[]) returns void
language plpgsql stable set search_path from current as $$
declare
    unknown constant bigint[] := array(
        select i from unnest(ids) i
        where not exists (select from dead_messages d
                          where d.consumer_id = consumer.id and d.id = i)
        order by i);
begin
    if unknown <> '{}' then
        raise exception 'consumer % has no dead letter %', quote_literal(consumer.name),
            array_to_string(unknown, ', ')
            using errcode = 'CB007', hint = coalesce((
                select string_agg(format('The dead letter with the seq %s has the id %s.',
                                         d.seq, d.ids), ' ' order by d.seq)
                from (select l.seq, string_agg(l.id::text, ' or ' order by l.id) as ids
                      from dead_messages l
                      where l.consumer_id = consumer.id and l.seq = any (unknown)
                      group by l.seq) d),
                format('`cdcbridge dead list %s` prints the ids.', consumer.name));
    end if;
end $$;
