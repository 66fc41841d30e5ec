-- Published messages: the checks of publish(), and how a message is added to the log.

-- refuse_no_json(type): Refuse data of a type that publish() does not accept.
--
-- Accepted are json, jsonb, text and varchar, and domains over them.
-- Raises: CB004 for any other type.
create or replace function refuse_no_json(type regtype) returns void
language plpgsql stable as $$
declare
    base constant regtype := coalesce(
        nullif((select t.typbasetype from pg_type t where t.oid = type), 0), type);
begin
    if base not in ('json'::regtype, 'jsonb'::regtype, 'text'::regtype, 'varchar'::regtype) then
        raise exception 'data has the type %, but must be json, jsonb or text that is JSON', type
            using errcode = 'CB004',
            hint = 'to_json(...) turns a value into JSON.';
    end if;
end $$;

-- tell_duplicate(topic, dedup_id, seq): Report that a message was not added, as it is a duplicate.
--
-- A NOTICE informs people, and the setting cdcbridge.duplicate informs programs.
create or replace function tell_duplicate(topic text, dedup_id text, seq bigint) returns void
language plpgsql volatile as $$
begin
    perform set_config('cdcbridge.duplicate', 'on', true);
    raise notice 'dedup_id % of topic % was published before as seq %, so nothing was added',
        quote_literal(left(dedup_id, 80)),
        quote_literal(topic), seq;
end $$;

-- tell_unlisted(topic): Report by a NOTICE that no consumer receives messages of the topic.
--
-- A transaction that publishes several messages in a row to one topic gets one NOTICE (CB011).
create or replace function tell_unlisted(topic text) returns void
language plpgsql volatile as $$
declare
    told constant text := pg_current_xact_id() || ' ' || topic;
begin
    if current_setting('cdcbridge.unlisted', true) is distinct from told then
        perform set_config('cdcbridge.unlisted', told, true);
        raise notice 'no consumer lists the topic %, so no consumer receives the message',
            quote_literal(left(topic, 80))
            using errcode = 'CB011',
                  hint = 'Add the topic to a consumer. With start: earliest, '
                      'a new consumer receives this message, too.';
    end if;
end $$;

-- check_publish(topic, deliver_at, dedup_id, delay): Check these arguments of publish().
--
-- Raises: CB004 as publish() documents it.
create or replace function check_publish(topic text, deliver_at timestamptz, dedup_id text,
                                         delay interval) returns void
language plpgsql stable as $$
declare
    most constant interval := (select l.max_retention from limits l);
begin
    -- topic and dedup_id form the primary key of published. A btree entry has at most 2,700 bytes.
    if octet_length(topic) > 1024 then
        raise exception 'topic % has % bytes, but may have 1024 at most',
            quote_literal(left(topic, 40) || '...'), octet_length(topic)
            using errcode = 'CB004';
    elsif dedup_id = '' then
        raise exception 'dedup_id is empty'
            using errcode = 'CB004', hint = 'Pass null to publish without a dedup_id.';
    elsif octet_length(dedup_id) > 1024 then
        raise exception 'dedup_id % has % bytes, but may have 1024 at most',
            quote_literal(left(dedup_id, 40) || '...'), octet_length(dedup_id)
            using errcode = 'CB004',
                  hint = 'Pass a hash of it instead: encode(sha256(...), ''hex'').';
    elsif deliver_at is not null and delay is not null then
        raise exception 'deliver_at is % and delay is %, but only one of them may be given',
            deliver_at, delay
            using errcode = 'CB004', hint = 'deliver_at is a time, and delay counts from now.';
    elsif delay < interval '0' then
        raise exception 'delay is %, but must be at least 0 s', delay using errcode = 'CB004';
    elsif not isfinite(deliver_at) then
        raise exception 'deliver_at is %, but must be a time', deliver_at using errcode = 'CB004',
            hint = 'Pass null to deliver the message at once.';
    elsif deliver_at > later(moment(), most) then
        raise exception 'deliver_at is %, but must be at most % from now',
            deliver_at, justify_hours(most) using errcode = 'CB004',
            hint = 'A message may wait for store.max_retention at most.';
    elsif delay is not null then
        perform refuse_too_long('delay', delay);
    end if;
end $$;

-- publish_document(topic, key, data, sqs, deliver_at, dedup_id, delay) -> the seq of the message.
--
-- publish() without the check of the type of data. Its header describes the other parameters, the
-- errors and the locks.
-- Parameters:
--   sqs  what the SQS endpoint keeps with a message, for example its message attributes, or null.
--        It is the field sqs of the message's data.
create or replace function publish_document(topic text, key text, data json, sqs json,
                                            deliver_at timestamptz, dedup_id text, delay interval)
returns bigint
language plpgsql volatile as $$
declare
    -- Read before the time below.
    horizon constant bigint := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
    moment constant timestamptz := moment();
    first_seq bigint;
    new_seq bigint;
    number int; -- the number of partitions
begin
    if topic is null or topic = '' or strpos(topic, '.') > 0 then
        raise exception 'topic is %, but must be a name without a dot', quote_nullable(topic)
            using errcode = 'CB004',
                  hint = 'A name with a dot is the topic of a table, for example public.orders.';
    end if;
    if deliver_at is not null or dedup_id is not null or delay is not null
        or octet_length(topic) > 1024
    then
        perform check_publish(topic, deliver_at, dedup_id, delay);
        deliver_at := coalesce(deliver_at, later(moment, delay));
    end if;
    if dedup_id is not null then
        select p.seq into first_seq from published p
        where p.topic = publish_document.topic and p.dedup_id = publish_document.dedup_id
          and p.published_at > moment - interval '5 minutes';
        if found then
            perform tell_duplicate(topic, dedup_id, first_seq);
            return first_seq;
        end if;
    end if;
    loop
        number := log_partitions();
        new_seq := draw('messages_seq', 1);
        -- It changes only while no session can draw, so an equal number was valid at the draw.
        exit when number = log_partitions();
    end loop;
    if dedup_id is not null then
        insert into published as p (topic, dedup_id, seq, published_at)
        values (topic, dedup_id, new_seq, moment)
        on conflict on constraint published_pkey do update set seq = new_seq, published_at = moment
        where p.published_at <= moment - interval '5 minutes'
        returning p.seq into first_seq;
        if not found then -- another session published it first
            first_seq := (select p.seq from published p
                          where p.topic = publish_document.topic
                            and p.dedup_id = publish_document.dedup_id);
            perform tell_duplicate(topic, dedup_id, first_seq);
            return first_seq;
        end if;
        perform set_config('cdcbridge.duplicate', 'off', true);
    end if;
    perform append_published(new_seq, topic, key, partition_of(key, number), data, sqs,
                             case when deliver_at > moment then deliver_at end, moment, horizon);
    return new_seq;
end $$;

-- append_published(new_seq, topic, key, partition, data, sqs, deliver_at, moment, horizon): Insert
-- the message into the log, fan it out to its consumers, and notify them once.
--
-- Streams read the log itself and do not wait for deliver_at.
-- Raises:
--   CB005  the transaction is above READ COMMITTED, and consumers changed since its snapshot
--   55P03  ensure_segment() has waited too long
create or replace function append_published(new_seq bigint, topic text, key text, partition int,
                                            data json, sqs json, deliver_at timestamptz,
                                            moment timestamptz, horizon bigint)
returns void
language plpgsql volatile as $$
#variable_conflict use_column
declare
    body constant json := '{"op":"message","record":' || data || ',"old":null,"unchanged":[]'
        || coalesce(',"sqs":' || sqs, '') || '}';
    size constant int := octet_length(body::text);
    woken text;
    readers int;
begin
    -- Make the segment if it is missing, or the next one in the second half of a segment. A running
    -- bridge makes them earlier.
    if to_regclass(segment_name(new_seq)) is null
        or (new_seq % 1000 = 0 or new_seq % 1000000 >= 999000) and new_seq % 1000000 >= 500000
           and to_regclass(segment_name(new_seq + 1000000)) is null
    then
        perform ensure_segment(new_seq);
    end if;
    insert into messages (seq, topic, key, partition, data, inserted_at, publisher, horizon)
    values (new_seq, append_published.topic, append_published.key, append_published.partition,
            body, append_published.moment,
            pg_current_xact_id()::text::bigint, append_published.horizon);
    -- Only now, when messages is locked: a transaction that adds a consumer later waits for this
    -- one, and an earlier one was noted by note_consumer_change().
    if above_read_committed() and not sees_consumers() then
        raise exception
            'consumers were added, changed or removed since the snapshot of this % transaction',
            upper(current_setting('transaction_isolation'))
            using errcode = 'CB005',
                  hint = 'Run the transaction again, or publish in READ COMMITTED.';
    end if;
    with wanting as materialized (
        select c.id, c.mode = 'stream' as reads_log, c.mode = 'fifo' as in_order,
               (c.config ->> 'max_message_bytes')::bigint as max_bytes,
               c.config ? 'key' as own_key,
               case when c.config ? 'key' then record_key(append_published.data, c.config -> 'key')
                    else append_published.key end as key
        from consumers c
        where c.config -> 'topics' ? append_published.topic
    ), queued as (
        select * from wanting w where not w.reads_log
    ), buried as (
        insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason,
                                   history, inserted_at)
        select w.id, new_seq, append_published.topic, w.key, body, 0,
               format('oversized: data has %s bytes, max_message_bytes is %s', size, w.max_bytes),
               '[]', now()
        from queued w where size > w.max_bytes
    ), later as (
        insert into delayed (consumer_id, seq, key, deliver_count, last_delivered_at, visible_at,
                             history, inserted_at, ord)
        select w.id, new_seq, w.key, 0, '-infinity', deliver_at, '[]', now(), new_seq
        from queued w where size <= w.max_bytes and not w.in_order and deliver_at is not null
    ), fanned as (
        insert into waiting (consumer_id, ord, seqs, keys, not_before)
        select w.id, new_seq, array[new_seq],
               case when w.in_order or w.own_key then array[w.key] end, deliver_at
        from queued w where size <= w.max_bytes and (w.in_order or deliver_at is null))
    select string_agg(w.id::text, ',' order by w.id)
               filter (where w.reads_log or deliver_at is null), count(*)
    into woken, readers from wanting w;
    if readers = 0 then
        perform tell_unlisted(append_published.topic);
    end if;
    if woken is not null then
        perform pg_notify(store_schema(), case when length(woken) < 7900 then woken else '' end);
    end if;
end $$;

-- record_key(record, columns) -> the key that these columns of a published message form.
--
-- It has the same form as the key that these columns of a table's row would have.
create or replace function record_key(record json, columns jsonb) returns text
language sql immutable as $$
    select case
        when json_typeof(record) is distinct from 'object' then null
        when strpos(record::text, E'\\u') > 0
        then escaped_key(record, array(select jsonb_array_elements_text(columns)))
        when jsonb_array_length(columns) = 1 then record ->> (columns ->> 0)
        else (select case when count(record ->> c) > 0
                     then '[' || string_agg(coalesce(to_json(record ->> c)::text, 'null'), ','
                                            order by n) || ']' end
              from jsonb_array_elements_text(columns) with ordinality as k (c, n)) end
$$;

-- escaped_key(record, columns) -> the result of record_key(), for a record that contains escapes.
--
-- Among the escapes may be "\u0000" or half of a surrogate pair, which json operators refuse.
create or replace function escaped_key(record json, columns text[]) returns text
language plpgsql immutable as $$
declare
    texts text[] := array(select text_of(v)
                          from unnest(record_values(('{"record":' || record || '}')::json, columns))
                              with ordinality as u (v, n)
                          order by n);
begin
    if cardinality(texts) = 1 then
        return texts[1];
    end if;
    return (select case when count(t) > 0
                   then '[' || string_agg(coalesce(to_json(t)::text, 'null'), ',' order by n)
                        || ']' end
            from unnest(texts) with ordinality as u (t, n));
end $$;

-- text_of(document) -> the text of a JSON document, as the operator ->> returns it.
--
-- A document that PostgreSQL cannot represent as a text, for example "\u0000", is returned as JSON.
create or replace function text_of(document text) returns text
language plpgsql immutable as $$
begin
    return case when left(document, 1) = '"' or document = 'null' then document::json #>> '{}'
                else document end;
exception
    when data_exception then
        return document;
end $$;

-- forget_published() -> the number of dedup ids removed, because they are older than 5 minutes.
--
-- The running bridge calls it. At most 10,000 are removed per call.
-- Locks: the rows that it removes, with SKIP LOCKED.
create or replace function forget_published() returns int
language plpgsql volatile set search_path from current as $$
declare
    forgotten int;
begin
    delete from published p where p.ctid = any (array(
        select o.ctid from published o where o.published_at <= moment() - interval '5 minutes'
        limit 10000 for update skip locked));
    get diagnostics forgotten = row_count;
    return forgotten;
end $$;
