-- A claim: the work of receive() after the consumer has been found.
--
-- A claim finds free places within the consumer's max_in_flight (places.sql). Then it takes up to
-- as many messages: first deliveries whose visibility timeout has passed, then messages that were
-- given back, then messages that wait. Their leases all carry the same token.

-- check_receive(max_messages, visibility_timeout): Check the arguments of receive().
--
-- Raises:
--   CB004  max_messages is null or below 1, or visibility_timeout is negative or longer than
--          store.max_retention
--   CB005  the transaction's isolation level is above READ COMMITTED
create or replace function check_receive(max_messages int, visibility_timeout interval) returns void
language plpgsql stable as $$
begin
    perform require_read_committed('receive()');
    if max_messages is null or max_messages < 1 then
        raise exception 'max_messages is %; it must be at least 1',
            coalesce(max_messages::text, 'null')
            using errcode = 'CB004';
    end if;
    if visibility_timeout < interval '0' then
        raise exception 'visibility_timeout is %; it must not be negative', visibility_timeout
            using errcode = 'CB004';
    end if;
    perform refuse_too_long('visibility_timeout', visibility_timeout);
end $$;

-- draw_token() -> a new token, registered with the gap guard as draw() registers a value.
--
-- Unlike draw(), it does not take the sequence's draw lock. Only hints depend on the tokens that
-- are safe, and hints only ever rise.
-- Raises:
--   55P03 (lock_not_available)  another program holds the advisory lock exclusively
-- Locks: the gap guard's shared advisory lock of tokens_seq, to the end of the transaction.
create or replace function draw_token() returns bigint
language plpgsql volatile as $$
begin
    -- Conditions are expressions and cost less than a PERFORM each, which would be a statement.
    -- cdcbridge takes this lock in shared mode only, so the try fails only if another program holds
    -- the lock.
    if current_setting('cdcbridge.claiming', true) is distinct from pg_current_xact_id()::text
        and (not pg_try_advisory_xact_lock_shared(
                     'tokens_seq'::regclass::oid::int,
                     low_half(coalesce(pg_sequence_last_value('tokens_seq'), 0)))
             or set_config('cdcbridge.claiming', pg_current_xact_id()::text, true) is null)
    then
        raise exception 'the advisory lock class of tokens_seq is in use by others'
            using errcode = 'lock_not_available';
    end if;
    return nextval('tokens_seq');
end $$;

-- token_drawn(token, taken) -> the token of a claim that has taken these messages.
--
-- If `token` is null, the result is the token that was drawn for these messages. If the claim has
-- taken no messages either, the result is null.
create or replace function token_drawn(token bigint, taken bigint[]) returns bigint
language sql volatile as $$
    select case when token is null and taken <> '{}' then currval('tokens_seq') else token end
$$;

-- claim(consumer, wanted, moment, until, places, expired, due): Take up to `wanted` messages.
--
-- Parameters:
--   moment, until         the current time, and the end of the visibility timeout
--   places, expired, due  the result of survey() if claim_shared() calls, otherwise null
-- Returns:
--   taken  the seqs of the messages, in order (their leases carry the token drawn last)
--   plain  true if all are delivered for the first time, none is redriven, and the order is the
--          order of the log
-- Locks: the rows of the messages, by SKIP LOCKED, to the end of the transaction, and the locks
-- that places.sql describes. A claim that renews the hint also tries the advisory lock (waiting,
-- consumer) and never waits for it.
create or replace function claim(consumer consumers, wanted int, moment timestamptz,
                                 until timestamptz, places smallint[] default null,
                                 expired boolean default null, due boolean default null,
                                 out taken bigint[], out plain boolean)
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
        -- Set: this transaction has claimed, or tried to claim, before.
        if coalesce(current_setting(setting, true), '') <> '' then
            select k.taken, k.plain into taken, plain
            from claim_shared(consumer, hint, wanted, slots, moment, until) k;
            return;
        end if;
        for i in 0 .. 3 loop
            number := cardinality(slots);
            slots := take_slots(consumer.id, max_in_flight, least(wanted, max_in_flight) << 2 * i,
                                slots);
            -- Checked after the slots are locked: a claim that begins to share after this check
            -- sees that they are taken.
            if not (pg_try_advisory_lock(sharing) and pg_advisory_unlock(sharing)) then
                if somebody_shares(sharing) then
                    select k.taken, k.plain into taken, plain
                    from claim_shared(consumer, hint, wanted, slots, moment, until) k;
                    return;
                end if;
            end if;
            look := survey(consumer.id, hint, max_in_flight, wanted, slots, null, moment);
            -- The first slots suffice if they hold nothing in flight. If they do hold something,
            -- take more, step by step, so that other claims still find some.
            exit when cardinality(look.places) >= wanted or cardinality(slots) = number;
        end loop;
        if cardinality(look.places) < wanted and cardinality(slots) < least(64, max_in_flight) then
            -- Not part of the condition above: a query in it would make each claim pay for the
            -- preparation of the query.
            if exists (select from claims_in_progress(consumer.id) p where p.used is not null) then
                select k.taken, k.plain into taken, plain
                from claim_shared(consumer, hint, wanted, slots, moment, until) k;
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
            taken := taken || claim_delayed(consumer.id, places[cardinality(taken) + 1:],
                                            cardinality(taken), token, moment, until);
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
            -- Usually all slots except the last are full, and a full slot need not be reported.
            -- Otherwise some slots are unused, and tell_claim() reports all of them.
            if slots[cardinality(slots)] <> coalesce(places[number], slots[1]) then
                perform tell_claim(consumer.id, places[:number], slots);
                number := null;
            else
                number := coalesce(number + 1 - array_position(places, slots[cardinality(slots)]),
                                   0);
            end if;
        end if;
        -- A condition is an expression and costs less than a PERFORM, which would be a statement.
        if number is not null
            and (pg_advisory_xact_lock_shared('hints'::regclass::oid::int, told_lock(
                     consumer.id, slots[cardinality(slots)], number)) is null
                 or set_config(setting, told_lock(0, slots[cardinality(slots)], number)::text,
                               true) is null)
        then
            null;
        end if;
    end if;
    if taken <> '{}'
        and (currval('tokens_seq') >= hint.token_floor + 128
             or taken[cardinality(taken)] >= hint.waiting_floor + 4096)
    then
        -- One claim renews the hint, and the others see the new hint when that claim commits. Any
        -- claim renews a hint that is four times as old, because the first claim may stay in its
        -- transaction for hours.
        if pg_try_advisory_xact_lock('waiting'::regclass::oid::int, consumer.id)
            or currval('tokens_seq') >= hint.token_floor + 512
            or taken[cardinality(taken)] >= hint.waiting_floor + 16384
        then
            perform renew_hint(consumer.id, hint, taken[cardinality(taken)]);
        end if;
    end if;
end $$;
