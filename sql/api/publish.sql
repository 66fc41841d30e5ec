-- publish(topic, key, data, deliver_at, dedup_id, delay) -> its seq. Logs the message and fans it out to the consumers of the topic
-- in the caller's transaction: they see it when that commits, and never if it does not.
-- data: json, jsonb, or a text that is JSON. anycompatible, so that one function takes the three, and '{"id": 1}' is a text.
-- deliver_at: not delivered before; in fifo its key waits with it. delay: the same, counted from now; one of the two.
-- dedup_id: a second message of the topic with the same one within 5 minutes of the first adds nothing, and gives the first one's seq.
-- A NOTICE says so, and the setting cdcbridge.duplicate, on or off, tells a program, to the end of the transaction:
-- select seq, current_setting('cdcbridge.duplicate') from publish('invoices', '42', '{"id": 42}', dedup_id => 'i-42') seq.
-- Where no consumer lists the topic, a NOTICE (CB011) says so, once in a transaction.
-- Raises CB004: no topic, or one with a dot or of more than 1,024 bytes; data of another type; deliver_at infinite or beyond
-- store.max_retention from now; a delay that is negative or longer than that, or both; a dedup_id that is empty or has more than
-- 1,024 bytes. 22P02: a text that is no JSON. CB005: above READ COMMITTED, where a consumer was added, changed or removed
-- since the transaction's snapshot. 55P03: ensure_segment(). Registers with the gap guard.
-- Locks: the gap guard's, shared, to the end of the transaction. While another transaction that published the same dedup_id is open, it
-- waits for that one's end, as long as the session's lock_timeout allows (55P03). Only then it is known whose message counts. Without a
-- bridge, the one that makes the log's next segment locks as create_segments() does.
create or replace function publish(topic text, key text, data anycompatible, deliver_at timestamptz default null,
                                   dedup_id text default null, delay interval default null) returns bigint
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    horizon constant bigint := pg_snapshot_xmin(pg_current_snapshot())::text::bigint; -- before the moment
    moment constant timestamptz := moment();
    first_seq bigint;
    new_seq bigint;
    number int; -- of partitions
begin
    if topic is null or topic = '' or strpos(topic, '.') > 0 then
        raise exception 'topic is %; it must be a name without a dot', quote_nullable(topic) using errcode = 'CB004',
            hint = 'Names with a dot are tables''.';
    end if;
    if pg_typeof(data) not in ('json'::regtype, 'jsonb'::regtype, 'text'::regtype) then
        perform refuse_no_json(pg_typeof(data));
    end if;
    if deliver_at is not null or dedup_id is not null or delay is not null or octet_length(topic) > 1024 then
        perform check_publish(topic, deliver_at, dedup_id, delay);
        deliver_at := coalesce(deliver_at, later(moment, delay));
    end if;
    if dedup_id is not null then
        select p.seq into first_seq from published p
        where p.topic = publish.topic and p.dedup_id = publish.dedup_id and p.published_at > moment - interval '5 minutes';
        if found then
            perform tell_duplicate(topic, dedup_id, first_seq);
            return first_seq;
        end if;
    end if;
    loop
        number := log_partitions();
        new_seq := draw('messages_seq', 1);
        exit when number = log_partitions(); -- it changes only while nobody can draw: so it was this when the seq was drawn
    end loop;
    if dedup_id is not null then
        insert into published as p (topic, dedup_id, seq, published_at) values (topic, dedup_id, new_seq, moment)
        on conflict on constraint published_pkey do update set seq = new_seq, published_at = moment
        where p.published_at <= moment - interval '5 minutes'
        returning p.seq into first_seq;
        if not found then -- another session was faster
            first_seq := (select p.seq from published p where p.topic = publish.topic and p.dedup_id = publish.dedup_id);
            perform tell_duplicate(topic, dedup_id, first_seq);
            return first_seq;
        end if;
        perform set_config('cdcbridge.duplicate', 'off', true);
    end if;
    perform append_published(new_seq, topic, key, partition_of(key, number), coalesce(data::json, 'null'),
                             case when deliver_at > moment then deliver_at end, moment, horizon);
    return new_seq;
end $$;
