-- An append: the transaction in which the bridge adds messages to the store.
--
-- The bridge sends the rows of the log and of waiting by COPY. The functions of this file write
-- everything else. Only the leading bridge calls begin_append() and finish_append(). A replay also
-- calls some of the others.

-- begin_append(epoch, messages) -> the first of `messages` consecutive seqs, or 0 for no messages.
--
-- Raises:
--   CB005  the isolation level is above READ COMMITTED
--   CB010  a bridge with a newer epoch leads
-- Locks: the fence, and a lock of the gap guard (see draw()), both to the end of the transaction.
create or replace function begin_append(epoch bigint, messages int) returns bigint
language plpgsql set search_path from current as $$
declare
    newest leaders;
    low bigint;
begin
    perform require_read_committed('begin_append()');
    perform pg_advisory_xact_lock(fence_key());
    -- In a statement of its own, so that its snapshot is taken after the lock.
    select * into newest from leaders l order by l.epoch desc limit 1;
    if newest.epoch is distinct from begin_append.epoch then
        raise exception 'epoch % has ended, because % leads with epoch %',
            begin_append.epoch, newest.holder, newest.epoch using errcode = 'CB010';
    end if;
    if messages = 0 then
        return 0;
    end if;
    low := draw('messages_seq', messages);
    return low;
end $$;

-- finish_append(commit_lsn, ordinal, end_lsn, unfinished, commit_time, consumers, effective_time):
-- Store the position that the log has reached, and notify the receivers.
--
-- Parameters:
--   commit_time  when the last transaction committed, in microseconds since 2000-01-01 UTC;
--                null: the source had nothing more to send, so the current time is stored
--   consumers    the ids of the consumers that received messages, separated by commas. They are
--                sent in one notification on the channel that has the name of the schema.
--   effective_time  the greatest commit time so far, in microseconds since 2000-01-01 UTC
create or replace function finish_append(commit_lsn pg_lsn, ordinal int, end_lsn pg_lsn,
                                         unfinished jsonb, commit_time bigint, consumers text,
                                         effective_time bigint)
returns void
language plpgsql set search_path from current as $$
declare
    -- Read from the right end of the index. Dead rows that an old snapshot keeps are to its left.
    previous constant bigint := (select p.id from positions p order by p.id desc limit 1);
begin
    insert into positions (commit_lsn, ordinal, end_lsn, unfinished, effective_time, commit_time)
    values (commit_lsn, ordinal, end_lsn, unfinished, effective_time,
            coalesce(timestamptz '2000-01-01 00:00:00+00'
                         + commit_time * interval '1 microsecond', clock_timestamp()));
    delete from positions where id = previous;
    if consumers is not null then
        perform pg_notify(store_schema(),
                          case when length(consumers) < 7900 then consumers else '' end);
    end if;
end $$;

-- keep_own(consumer_ids, seqs, keys, documents): Store data that a consumer receives instead of the
-- data in the log.
--
-- An example is the delete that a consumer receives when a row leaves its filter. The data is
-- stored in the table of redriven messages. The message keeps its place in the order, so tie is 0.
create or replace function keep_own(consumer_ids int[], seqs bigint[], keys text[],
                                    documents text[]) returns void
language sql set search_path from current as $$
    insert into redriven (consumer_id, seq, topic, key, data, commit_lsn, ordinal, commit_time,
                          inserted_at, ord)
    select o.consumer_id, m.seq, m.topic, o.key, o.document::json, m.commit_lsn, m.ordinal,
           m.commit_time, m.inserted_at, m.seq
    from unnest(consumer_ids, seqs, keys, documents) as o (consumer_id, seq, key, document)
    join messages m on m.seq = o.seq
$$;

-- bury_appended(consumer_ids, seqs, reasons, keys): Make dead letters of messages in the log.
--
-- keys are the keys that the messages have for these consumers.
create or replace function bury_appended(consumer_ids int[], seqs bigint[], reasons text[],
                                         keys text[]) returns void
language sql set search_path from current as $$
    with own as (
        delete from redriven r using unnest(consumer_ids, seqs) as d (consumer_id, seq)
        where r.consumer_id = d.consumer_id and r.seq = d.seq
        returning r.consumer_id, r.seq, r.data)
    insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason, history,
                               commit_lsn, ordinal, commit_time, inserted_at)
    select d.consumer_id, m.seq, m.topic, d.key, coalesce(o.data, m.data), 0, d.reason, '[]',
           m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
    from unnest(consumer_ids, seqs, reasons, keys) as d (consumer_id, seq, reason, key)
    join messages m on m.seq = d.seq
    left join own o on o.consumer_id = d.consumer_id and o.seq = d.seq
    order by m.seq, d.consumer_id
$$;

-- delay_appended(consumer_ids, seqs, keys, times): Let messages of the log be delivered only from
-- these times on, as publish() does with deliver_at.
--
-- A message becomes a dead letter if its time is more than store.max_retention from now.
create or replace function delay_appended(consumer_ids int[], seqs bigint[], keys text[],
                                          times timestamptz[]) returns void
language plpgsql set search_path from current as $$
declare
    moment constant timestamptz := moment();
    most constant interval := (select l.max_retention from limits l);
    last constant timestamptz := later(moment, most);
begin
    perform bury_appended(array_agg(d.consumer_id), array_agg(d.seq), array_agg(
                format('undecodable: deliver_at is %s, more than %s ahead', time_text(d.at),
                       justify_hours(most))), array_agg(d.key))
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at) where d.at > last;
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at,
                         history, inserted_at, ord)
    select d.consumer_id, d.seq, d.key, 0, '-infinity', greatest(d.at, moment), '[]', moment, d.seq
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at)
    join consumers c on c.id = d.consumer_id and c.mode = 'queue' where d.at <= last;
    insert into waiting (consumer_id, ord, seqs, keys, not_before)
    select d.consumer_id, d.seq, array[d.seq], array[d.key], case when d.at > moment then d.at end
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at)
    join consumers c on c.id = d.consumer_id and c.mode = 'fifo' where d.at <= last;
end $$;

-- insert_barriers(consumer_ids, seqs): Insert truncates for fifo consumers, as barriers.
--
-- A barrier is delivered after all messages before it and before all messages after it.
create or replace function insert_barriers(consumer_ids int[], seqs bigint[]) returns void
language sql set search_path from current as $$
    insert into waiting (consumer_id, ord, seqs, keys, barrier)
    select b.consumer_id, b.seq, array[b.seq], array[null::text], true
    from unnest(consumer_ids, seqs) as b (consumer_id, seq)
$$;
