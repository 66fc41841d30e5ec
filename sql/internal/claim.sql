-- A claim: the work of receive() after the consumer has been found.
--
-- A claim finds the free capacity within the consumer's max_in_flight (shards.sql). Then it takes
-- up to as many messages: first deliveries whose visibility timeout has passed, then messages that
-- were given back, then messages that wait. Their leases all carry the same claim_id.

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
    perform check_max_messages(max_messages);
    if visibility_timeout < interval '0' then
        raise exception 'visibility_timeout is %, but must be at least 0 s', visibility_timeout
            using errcode = 'CB004';
    end if;
    perform refuse_too_long('visibility_timeout', visibility_timeout);
end $$;

-- draw_claim_id() -> a new id of a claim, registered with the gap guard as draw() registers a
-- value.
--
-- Unlike draw(), it does not take the sequence's draw lock. Only hints depend on the ids that are
-- safe, and hints only ever rise.
-- Raises:
--   55P03 (lock_not_available)  another program holds the advisory lock exclusively
-- Locks: the gap guard's shared advisory lock of claim_ids_seq, to the end of the transaction.
create or replace function draw_claim_id() returns bigint
language plpgsql volatile as $$
begin
    -- Conditions are expressions and cost less than a PERFORM each, which would be a statement.
    -- cdcbridge takes this lock in shared mode only, so the try fails only if another program holds
    -- the lock.
    if current_setting('cdcbridge.claiming', true) is distinct from pg_current_xact_id()::text
        and (not pg_try_advisory_xact_lock_shared(
                     'claim_ids_seq'::regclass::oid::int,
                     low_half(coalesce(pg_sequence_last_value('claim_ids_seq'), 0)))
             or set_config('cdcbridge.claiming', pg_current_xact_id()::text, true) is null)
    then
        raise exception 'another program holds an advisory lock of the gap guard (classid %)',
            'claim_ids_seq'::regclass::oid
            using errcode = 'lock_not_available', hint = 'pg_locks shows its pid.';
    end if;
    return nextval('claim_ids_seq');
end $$;

-- claim_id_drawn(own_claim, taken) -> the id of a claim that has taken these messages.
--
-- If `own_claim` is null, the result is the id that was drawn for these messages. If the claim has
-- taken no messages either, the result is null.
create or replace function claim_id_drawn(own_claim bigint, taken bigint[]) returns bigint
language sql volatile as $$
    select case when own_claim is null and taken <> '{}' then currval('claim_ids_seq')
                else own_claim end
$$;

-- claim(consumer, wanted, moment, until, capacity, expired, due): Take up to `wanted` messages.
--
-- Parameters:
--   moment, until           the current time, and the end of the visibility timeout
--   capacity, expired, due  the result of survey() if claim_shared() calls, otherwise null
-- Returns:
--   taken  the seqs of the messages, in order (their leases carry the claim_id drawn last)
--   plain  true if all are delivered for the first time, none is redriven, and the order is the
--          order of the log
-- Locks: the rows of the messages, by SKIP LOCKED, to the end of the transaction, and the locks
-- that shards.sql describes. A claim that renews the hint also tries the advisory lock (waiting,
-- consumer) and never waits for it.
create or replace function claim(consumer consumers, wanted int, moment timestamptz,
                                 until timestamptz, capacity smallint[] default null,
                                 expired boolean default null, due boolean default null,
                                 out taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    max_in_flight constant int := consumer.config ->> 'max_in_flight';
    shards smallint[] := '{}';
    number int;
    hint constant hints := newest_hint(consumer.id);
    sharing constant bigint := sharing_lock(consumer.id);
    setting constant text := 'cdcbridge.claimed_' || consumer.id;
    own_claim bigint;
    look record;
    fresh record;
begin
    taken := '{}';
    plain := true;
    if capacity is null then
        -- Set: this transaction has claimed, or tried to claim, before.
        if coalesce(current_setting(setting, true), '') <> '' then
            select k.taken, k.plain into taken, plain
            from claim_shared(consumer, hint, wanted, shards, moment, until) k;
            return;
        end if;
        for i in 0 .. 3 loop
            number := cardinality(shards);
            shards := take_shards(consumer.id, max_in_flight, least(wanted, max_in_flight) << 2 * i,
                                shards);
            -- Checked after the shards are locked: a claim that begins to share after this check
            -- sees that they are taken.
            if not (pg_try_advisory_lock(sharing) and pg_advisory_unlock(sharing)) then
                if somebody_shares(sharing) then
                    select k.taken, k.plain into taken, plain
                    from claim_shared(consumer, hint, wanted, shards, moment, until) k;
                    return;
                end if;
            end if;
            look := survey(consumer.id, hint, max_in_flight, wanted, shards, null, moment);
            -- The first shards suffice if they hold nothing in flight. If they do hold something,
            -- take more, step by step, so that other claims still find some.
            exit when cardinality(look.capacity) >= wanted or cardinality(shards) = number;
        end loop;
        if cardinality(look.capacity) < wanted
            and cardinality(shards) < least(64, max_in_flight)
        then
            -- Not part of the condition above: a query in it would make each claim pay for the
            -- preparation of the query.
            if exists (select from claims_in_progress(consumer.id) p where p.used is not null) then
                select k.taken, k.plain into taken, plain
                from claim_shared(consumer, hint, wanted, shards, moment, until) k;
                return;
            end if;
        end if;
        capacity := look.capacity;
        expired := look.expired;
        due := look.due;
    end if;
    if cardinality(capacity) = 0 then
        null;
    elsif consumer.mode = 'fifo' then
        select k.taken, k.plain into taken, plain
        from claim_in_order(consumer, hint, capacity, expired, own_claim, moment, until) k;
    else
        if expired then
            taken := claim_expired(consumer, hint, capacity, own_claim, moment, until);
            own_claim := claim_id_drawn(own_claim, taken);
        end if;
        if due and cardinality(taken) < cardinality(capacity) then
            taken := taken || claim_delayed(consumer.id, capacity[cardinality(taken) + 1:],
                                            cardinality(taken), own_claim, moment, until);
            own_claim := claim_id_drawn(own_claim, taken);
        end if;
        if cardinality(taken) < cardinality(capacity) then
            fresh := claim_waiting(consumer.id, hint, capacity, taken, own_claim, moment, until);
            taken := fresh.all_taken;
            plain := fresh.plain;
        else
            plain := false;
        end if;
    end if;
    if shards <> '{}' then
        number := cardinality(taken);
        if cardinality(shards) > 1 then
            -- Usually all shards except the last are full, and a full shard need not be reported.
            -- Otherwise some shards are unused, and tell_claim() reports all of them.
            if shards[cardinality(shards)] <> coalesce(capacity[number], shards[1]) then
                perform tell_claim(consumer.id, capacity[:number], shards);
                number := null;
            else
                number := coalesce(number + 1 - array_position(capacity,
                                                               shards[cardinality(shards)]),
                                   0);
            end if;
        end if;
        -- A condition is an expression and costs less than a PERFORM, which would be a statement.
        if number is not null
            and (pg_advisory_xact_lock_shared('hints'::regclass::oid::int, told_lock(
                     consumer.id, shards[cardinality(shards)], number)) is null
                 or set_config(setting, told_lock(0, shards[cardinality(shards)], number)::text,
                               true) is null)
        then
            null;
        end if;
    end if;
    if taken <> '{}'
        and (currval('claim_ids_seq') >= hint.claim_floor + 128
             or taken[cardinality(taken)] >= hint.waiting_floor + 4096)
    then
        -- One claim renews the hint, and the others see the new hint when that claim commits. Any
        -- claim renews a hint that is four times as old, because the first claim may stay in its
        -- transaction for hours.
        if pg_try_advisory_xact_lock('waiting'::regclass::oid::int, consumer.id)
            or currval('claim_ids_seq') >= hint.claim_floor + 512
            or taken[cardinality(taken)] >= hint.waiting_floor + 16384
        then
            perform renew_hint(consumer.id, hint, taken[cardinality(taken)]);
        end if;
    end if;
end $$;
