-- receive(consumer, max_messages, visibility_timeout) -> up to max_messages deliveries.
--
-- Each message is invisible to others for visibility_timeout (default: the consumer's) and carries a fresh receipt
-- for ack, nack and extend. Those whose timeout passed come first, then those given back, then new ones; each of the
-- three in log order, redriven messages behind what waited when they were redriven. A fifo consumer gets messages of a
-- key in log order, several at once if need be, and none while another delivery of the key is in flight.
-- Raises CB001 (unknown consumer), CB002 (a stream), CB004 (bad argument), CB005 (isolation level above READ COMMITTED,
-- where the claim would work on a snapshot older than its locks), CB008 (not this consumer's role). A paused consumer
-- gives a NOTICE and nothing else.
-- Locks: the rows it takes, by SKIP LOCKED, and places within max_in_flight (033), to the end of the caller's transaction. So
-- receivers do not wait for each other, and one that stays in its transaction only keeps from others the places that it uses.
-- Planner settings are pinned: missing or stale statistics must never turn a claim into a scan of everything.
create or replace function receive(consumer text, max_messages int default 10, visibility_timeout interval default null)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               not_visible_until timestamptz, commit_lsn pg_lsn, ordinal int, commit_time timestamptz,
               inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
    moment timestamptz := moment();
    until timestamptz := later(moment, coalesce(visibility_timeout,
                                                make_interval(secs => (c.config ->> 'visibility_timeout')::float8)));
    claimed bigint;
    suffix text; -- of their receipts
    k record;    -- the claim
    lowest bigint;
    highest bigint;
begin
    if c.paused or coalesce(max_messages, 0) < 1 or visibility_timeout < interval '0' or visibility_timeout > interval '1 min'
        or current_setting('transaction_isolation') <> 'read committed'
    then
        perform check_receive(max_messages, visibility_timeout);
        if c.paused then
            raise notice 'consumer % is paused', quote_literal(c.name);
            return;
        end if;
    end if;
    k := claim(c, max_messages, moment, until);
    if k.taken = '{}' then
        return;
    end if;
    claimed := currval('tokens_seq'); -- the claim's
    suffix := '-' || claimed;
    if k.plain and not c.config ?| '{columns,key,on_leave}' then
        -- All that there is to know stands in the log, in this order. Where there is no other message between: one walk along it.
        lowest := k.taken[1];
        highest := k.taken[cardinality(k.taken)];
        if highest - lowest = cardinality(k.taken) - 1 then
            return query
                select m.seq::text || suffix, m.seq, m.topic, m.key, m.data, 1, until, m.commit_lsn, m.ordinal,
                       m.commit_time, m.inserted_at
                from messages m where m.seq between lowest and highest order by m.seq;
            return;
        elsif highest - lowest < 4 * cardinality(k.taken) then
            return query
                select m.seq::text || suffix, m.seq, m.topic, m.key, m.data, 1, until, m.commit_lsn, m.ordinal,
                       m.commit_time, m.inserted_at
                from (select * from messages m where m.seq between lowest and highest order by m.seq offset 0) m
                where m.seq in (select t from unnest(k.taken) t);
            return;
        end if;
    end if;
    select min(t.seq), max(t.seq) into lowest, highest from unnest(k.taken) as t (seq);
    if c.config ? 'columns' then
        perform bury_unprojectable(c, claimed);
    end if;
    return query
        select u.seq::text || suffix, u.seq, coalesce(m.topic, r.topic),
               case when l.keys is null then m.key else u.key end,
               case when c.config ? 'columns' then project(coalesce(r.data, m.data), c.config -> 'columns')
                    else coalesce(r.data, m.data) end,
               l.deliver_count, l.not_visible_until, coalesce(m.commit_lsn, r.commit_lsn),
               coalesce(m.ordinal, r.ordinal), coalesce(m.commit_time, r.commit_time),
               coalesce(m.inserted_at, r.inserted_at)
        from leases l
        cross join lateral unnest(l.seqs, l.keys) with ordinality as u (seq, key, n)
        -- Lateral, so that it is a look-up each, whatever the statistics say.
        left join lateral (select * from messages m where m.seq = u.seq and m.seq between lowest and highest limit 1) m
            on true
        left join lateral (select * from redriven r where r.consumer_id = c.id and r.seq = u.seq limit 1) r on true
        where l.consumer_id = c.id and l.token = claimed
          and not exists (select from settled s where s.consumer_id = c.id and s.token = claimed and s.part = l.part
                          and s.seq = u.seq)
        order by l.part, u.n;
end $$;

-- check_receive(max_messages, visibility_timeout): raises what receive() documents of its arguments.
create or replace function check_receive(max_messages int, visibility_timeout interval) returns void
language plpgsql stable as $$
begin
    perform require_read_committed('receive()');
    if max_messages is null or max_messages < 1 then
        raise exception 'max_messages is %; it must be at least 1', coalesce(max_messages::text, 'null')
            using errcode = 'CB004';
    end if;
    if visibility_timeout < interval '0' then
        raise exception 'visibility_timeout is %; it must not be negative', visibility_timeout using errcode = 'CB004';
    end if;
    perform refuse_too_long('visibility_timeout', visibility_timeout);
end $$;

-- draw_token() -> a new token, registered with the gap guard as draw() does it, but without its lock: the hints that it
-- serves only ever rise.
create or replace function draw_token() returns bigint
language plpgsql volatile as $$
begin
    -- Conditions, which are expressions, where a PERFORM each would be a statement. Nobody ever takes the lock alone.
    if current_setting('cdcbridge.claiming', true) is distinct from pg_current_xact_id()::text
        and (not pg_try_advisory_xact_lock_shared('tokens_seq'::regclass::oid::int,
                                                  low_half(coalesce(pg_sequence_last_value('tokens_seq'), 0)))
             or set_config('cdcbridge.claiming', pg_current_xact_id()::text, true) is null)
    then
        raise exception 'the advisory lock class of tokens_seq is in use by others' using errcode = 'lock_not_available';
    end if;
    return nextval('tokens_seq');
end $$;

-- token_drawn(token, taken) -> the token of a claim that has taken these: what it had, or has drawn for them.
create or replace function token_drawn(token bigint, taken bigint[]) returns bigint
language sql volatile as $$
    select case when token is null and taken <> '{}' then currval('tokens_seq') else token end
$$;

-- claim(consumer, wanted, moment, until) -> the seqs of messages that now have a lease under the token drawn last, in order; plain:
-- all are delivered for the first time, none is redriven, and the order is the log's.
-- places, expired, due: what claim_shared() has found; else null.
create or replace function claim(consumer consumers, wanted int, moment timestamptz, until timestamptz, places smallint[] default null,
                                 expired boolean default null, due boolean default null, out taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    max_in_flight constant int := consumer.config ->> 'max_in_flight';
    slots smallint[] := '{}';
    number int;
    hint constant hints := newest_hint(consumer.id);
    sharing constant bigint := sharing_lock(consumer.id);
    setting constant text := 'cdcbridge.claimed_' || consumer.id;
    token bigint;
    look record;
    fresh record;
begin
    taken := '{}';
    plain := true;
    if places is null then
        if coalesce(current_setting(setting, true), '') <> '' then -- this transaction has claimed before, or tried to
            select k.taken, k.plain into taken, plain from claim_shared(consumer, hint, wanted, slots, moment, until) k;
            return;
        end if;
        for i in 0 .. 3 loop
            number := cardinality(slots);
            slots := take_slots(consumer.id, max_in_flight, least(wanted, max_in_flight) << 2 * i, slots);
            -- Asked when it has slots: a claim that begins to share after that sees them taken.
            if not (pg_try_advisory_lock(sharing) and pg_advisory_unlock(sharing)) then
                if somebody_shares(sharing) then
                    select k.taken, k.plain into taken, plain from claim_shared(consumer, hint, wanted, slots, moment, until) k;
                    return;
                end if;
            end if;
            look := survey(consumer.id, hint, max_in_flight, wanted, slots, null, moment);
            -- Enough slots if nothing were in flight, but something is: more of them, and not at once all that others need.
            exit when cardinality(look.places) >= wanted or cardinality(slots) = number;
        end loop;
        if cardinality(look.places) < wanted and cardinality(slots) < least(64, max_in_flight) then
            -- Not in the condition above: with a query in it, each claim would pay for the query's start.
            if exists (select from claims_in_progress(consumer.id) p where p.used is not null) then
                select k.taken, k.plain into taken, plain from claim_shared(consumer, hint, wanted, slots, moment, until) k;
                return;
            end if;
        end if;
        places := look.places;
        expired := look.expired;
        due := look.due;
    end if;
    if cardinality(places) = 0 then
        null;
    elsif consumer.mode = 'fifo' then
        select k.taken, k.plain into taken, plain
        from claim_in_order(consumer, hint, places, expired, token, moment, until) k;
    else
        if expired then
            taken := claim_expired(consumer, hint, places, token, moment, until);
            token := token_drawn(token, taken);
        end if;
        if due and cardinality(taken) < cardinality(places) then
            taken := taken || claim_delayed(consumer.id, places[cardinality(taken) + 1:], cardinality(taken), token,
                                            moment, until);
            token := token_drawn(token, taken);
        end if;
        if cardinality(taken) < cardinality(places) then
            fresh := claim_waiting(consumer.id, hint, places, taken, token, moment, until);
            taken := fresh.all_taken;
            plain := fresh.plain;
        else
            plain := false;
        end if;
    end if;
    if slots <> '{}' then
        number := cardinality(taken);
        if cardinality(slots) > 1 then
            -- Mostly each is full but for the last, and full ones need not be told. Else some are not used.
            if slots[cardinality(slots)] <> coalesce(places[number], slots[1]) then
                perform tell_claim(consumer.id, places[:number], slots);
                number := null;
            else
                number := coalesce(number + 1 - array_position(places, slots[cardinality(slots)]), 0);
            end if;
        end if;
        -- A condition, which is an expression, where a PERFORM would be a statement.
        if number is not null
            and (pg_advisory_xact_lock_shared('hints'::regclass::oid::int, told_lock(consumer.id, slots[cardinality(slots)], number)) is null
                 or set_config(setting, told_lock(0, slots[cardinality(slots)], number)::text, true) is null)
        then
            null;
        end if;
    end if;
    if taken <> '{}'
        and (currval('tokens_seq') >= hint.token_floor + 128 or taken[cardinality(taken)] >= hint.waiting_floor + 4096)
    then
        -- One claim renews the hint, and the others see it when that claim commits. A hint that is four times as old is renewed by
        -- any claim, because the first one may stay in its transaction for hours.
        if pg_try_advisory_xact_lock('waiting'::regclass::oid::int, consumer.id)
            or currval('tokens_seq') >= hint.token_floor + 512 or taken[cardinality(taken)] >= hint.waiting_floor + 16384
        then
            perform renew_hint(consumer.id, hint, taken[cardinality(taken)]);
        end if;
    end if;
end $$;
