-- An append: what the bridge writes in one transaction, beside the rows that it sends by COPY. Only the leading bridge calls these functions.

-- begin_append(epoch, messages) -> the first of `messages` consecutive seqs.
-- Raises CB005 (isolation level above READ COMMITTED), CB010 where a newer epoch leads.
-- Locks: the fence, and the gap guard's, to the end of the transaction.
create or replace function begin_append(epoch bigint, messages int) returns bigint
language plpgsql set search_path from current as $$
declare
    newest leaders;
    low bigint;
begin
    perform require_read_committed('begin_append()');
    perform pg_advisory_xact_lock(fence_key());
    -- A statement of its own: its snapshot is younger than the lock.
    select * into newest from leaders l order by l.epoch desc limit 1;
    if newest.epoch is distinct from begin_append.epoch then
        raise exception 'epoch % is over: % leads with epoch %', begin_append.epoch, newest.holder, newest.epoch
            using errcode = 'CB010';
    end if;
    if messages = 0 then
        return 0;
    end if;
    low := draw('messages_seq', messages);
    return low;
end $$;

-- finish_append(commit_lsn, ordinal, end_lsn, unfinished, commit_time, consumers): the position of what was appended.
-- commit_time: of the last transaction, in microseconds since 2000-01-01 UTC; null = the source had nothing more.
-- consumers: ids that got rows, for one notification on the channel named like the schema.
create or replace function finish_append(commit_lsn pg_lsn, ordinal int, end_lsn pg_lsn, unfinished jsonb,
                                         commit_time bigint, consumers text) returns void
language plpgsql set search_path from current as $$
declare
    -- From the right end of the index: dead versions that an old snapshot keeps are all to its left.
    previous constant bigint := (select p.id from positions p order by p.id desc limit 1);
begin
    insert into positions (commit_lsn, ordinal, end_lsn, unfinished, commit_time)
    values (commit_lsn, ordinal, end_lsn, unfinished,
            coalesce(timestamptz '2000-01-01 00:00:00+00' + commit_time * interval '1 microsecond', clock_timestamp()));
    delete from positions where id = previous;
    if consumers is not null then
        perform pg_notify(current_schema(), case when length(consumers) < 7900 then consumers else '' end);
    end if;
end $$;

-- keep_own(consumer_ids, seqs, keys, documents): keeps data that replaces the log's for a consumer. For example, a delete of a row that
-- left the consumer's filter. It is kept with the data of redriven messages, but in the message's own place: tie is 0.
create or replace function keep_own(consumer_ids int[], seqs bigint[], keys text[], documents text[]) returns void
language sql set search_path from current as $$
    insert into redriven (consumer_id, seq, topic, key, data, commit_lsn, ordinal, commit_time, inserted_at, ord)
    select o.consumer_id, m.seq, m.topic, o.key, o.document::json, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at, m.seq
    from unnest(consumer_ids, seqs, keys, documents) as o (consumer_id, seq, key, document)
    join messages m on m.seq = o.seq
$$;

-- bury_appended(consumer_ids, seqs, reasons, keys): dead letters of messages that are in the log; keys are the consumers'.
create or replace function bury_appended(consumer_ids int[], seqs bigint[], reasons text[], keys text[]) returns void
language sql set search_path from current as $$
    with own as (
        delete from redriven r using unnest(consumer_ids, seqs) as d (consumer_id, seq)
        where r.consumer_id = d.consumer_id and r.seq = d.seq
        returning r.consumer_id, r.seq, r.data)
    insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason, history, commit_lsn, ordinal,
                               commit_time, inserted_at)
    select d.consumer_id, m.seq, m.topic, d.key, coalesce(o.data, m.data), 0, d.reason, '[]', m.commit_lsn, m.ordinal,
           m.commit_time, m.inserted_at
    from unnest(consumer_ids, seqs, reasons, keys) as d (consumer_id, seq, reason, key)
    join messages m on m.seq = d.seq
    left join own o on o.consumer_id = d.consumer_id and o.seq = d.seq
    order by m.seq, d.consumer_id
$$;

-- delay_appended(consumer_ids, seqs, keys, times): messages of the log that are delivered from these times on, as publish() does it with
-- deliver_at. Beyond store.max_retention they are dead letters.
create or replace function delay_appended(consumer_ids int[], seqs bigint[], keys text[], times timestamptz[]) returns void
language plpgsql set search_path from current as $$
declare
    moment constant timestamptz := moment();
    most constant interval := (select l.max_retention from limits l);
    last constant timestamptz := later(moment, most);
begin
    perform bury_appended(array_agg(d.consumer_id), array_agg(d.seq), array_agg(
                format('undecodable: deliver_at is %s, more than %s ahead', time_text(d.at), justify_hours(most))), array_agg(d.key))
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at) where d.at > last;
    insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at, history, inserted_at, ord)
    select d.consumer_id, d.seq, d.key, 0, '-infinity', greatest(d.at, moment), '[]', moment, d.seq
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at)
    join consumers c on c.id = d.consumer_id and c.mode = 'queue' where d.at <= last;
    insert into waiting (consumer_id, ord, seqs, keys, not_before)
    select d.consumer_id, d.seq, array[d.seq], array[d.key], case when d.at > moment then d.at end
    from unnest(consumer_ids, seqs, keys, times) as d (consumer_id, seq, key, at)
    join consumers c on c.id = d.consumer_id and c.mode = 'fifo' where d.at <= last;
end $$;

-- insert_barriers(consumer_ids, seqs): truncates, for fifo consumers: behind all before them, before all behind them.
create or replace function insert_barriers(consumer_ids int[], seqs bigint[]) returns void
language sql set search_path from current as $$
    insert into waiting (consumer_id, ord, seqs, keys, barrier)
    select b.consumer_id, b.seq, array[b.seq], array[null::text], true
    from unnest(consumer_ids, seqs) as b (consumer_id, seq)
$$;
