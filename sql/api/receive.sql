-- receive(consumer, max_messages, visibility_timeout, durable): deliver messages.
--
-- Each delivered message is invisible to other receivers for visibility_timeout. Each delivery has
-- its own receipt, which ack(), nack() and extend() take.
--
-- Deliveries whose visibility timeout has passed are returned first, in the order of their claims
-- (fifo: in log order). Messages that were given back, or in queue mode published for later, follow
-- when they are due, in the order of their times. New messages are last, in log order. A redriven
-- message follows the messages that waited when it was redriven.
--
-- A fifo consumer gets the messages of a key in log order, and one call may return several of them.
-- While another delivery of the key is in flight, it gets none of them.
--
-- For a paused consumer there is only a NOTICE and no rows.
--
-- The speed does not depend on table statistics. Planner settings are pinned, because missing or
-- stale statistics must never turn a claim into a scan of everything.
--
-- Parameters:
--   consumer            the name of a queue or fifo consumer
--   max_messages        the most deliveries to return, at least 1, default 10
--   visibility_timeout  how long the messages stay invisible to other receivers, at most
--                       store.max_retention, or null for the consumer's own
--   durable             whether the commit of this transaction waits for the disk as usual, default
--                       true. With false it does not wait: synchronous_commit is off until the
--                       transaction ends. A crash of the server may then lose the claim, and the
--                       messages are delivered once more. Use it if the call is the only statement
--                       of its transaction, because later writes of the transaction would be lost
--                       together with the claim. It has no effect if the transaction has written
--                       before.
-- Returns: one row per delivery.
--   receipt              identifies this delivery, for example 17-4
--   deliver_count        which delivery of the message it is, from 1
--   not_visible_until    when the visibility timeout ends
--   commit_lsn, ordinal  the position in the source, or null for a published message
--   inserted_at          when the message was appended to the log
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB004  max_messages is null or below 1, or visibility_timeout is negative or longer than
--          store.max_retention
--   CB005  the isolation level is above READ COMMITTED, so the claim would use a snapshot that is
--          older than its locks
--   CB008  the caller may not read this consumer
-- Locks: the rows that it takes, with SKIP LOCKED, and shards of max_in_flight
-- (sql/internal/shards.sql), until the caller's transaction ends. Receivers therefore do not wait
-- for each other. A receiver that stays in its transaction withholds from others the capacity that
-- it uses. A row can hold several messages, and it also withholds the rest of the rows from which
-- it took some (docs/CONSUMERS.md, "Limits").
-- Example:
--   select receipt, seq, topic, key, data from cdcbridge.receive('billing', 10);
create or replace function receive(consumer text, max_messages int default 10,
                                   visibility_timeout interval default null,
                                   durable boolean default true)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               not_visible_until timestamptz, commit_lsn pg_lsn, ordinal int,
               commit_time timestamptz, inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
    moment timestamptz := moment();
    until timestamptz := later(moment, coalesce(
        visibility_timeout, make_interval(secs => (c.config ->> 'visibility_timeout')::float8)));
    own_claim bigint;
    suffix text; -- the end of each receipt, for example -4
    k record;    -- the result of claim()
    lowest bigint;
    highest bigint;
begin
    if c.paused or coalesce(max_messages, 0) < 1
        or visibility_timeout < interval '0' or visibility_timeout > interval '1 min'
        or current_setting('transaction_isolation') <> 'read committed'
    then
        perform check_receive(max_messages, visibility_timeout);
        if c.paused then
            raise notice 'consumer % is paused', quote_literal(c.name)
                using hint = format('`cdcbridge consumers resume %s` ends the pause.', c.name);
            return;
        end if;
    end if;
    if not durable and pg_current_xact_id_if_assigned() is null
        and set_config('synchronous_commit', 'off', true) is null
    then
        null;
    end if;
    k := claim(c, max_messages, moment, until);
    if k.taken = '{}' then
        return;
    end if;
    own_claim := currval('claim_ids_seq'); -- the id of this claim
    suffix := '-' || own_claim;
    if k.plain and not c.config ?| '{columns,key,on_leave}' then
        -- The log has all columns, in this order. With no other messages between: one range scan.
        lowest := k.taken[1];
        highest := k.taken[cardinality(k.taken)];
        if highest - lowest = cardinality(k.taken) - 1 then
            return query
                select m.seq::text || suffix, m.seq, m.topic, m.key, m.data, 1, until, m.commit_lsn,
                       m.ordinal, m.commit_time, m.inserted_at
                from messages m where m.seq between lowest and highest order by m.seq;
            return;
        elsif highest - lowest < 4 * cardinality(k.taken) then
            return query
                select m.seq::text || suffix, m.seq, m.topic, m.key, m.data, 1, until, m.commit_lsn,
                       m.ordinal, m.commit_time, m.inserted_at
                from (select * from messages m
                      where m.seq between lowest and highest order by m.seq offset 0) m
                where m.seq in (select t from unnest(k.taken) t);
            return;
        end if;
    end if;
    select min(t.seq), max(t.seq) into lowest, highest from unnest(k.taken) as t (seq);
    if c.config ? 'columns' then
        perform bury_unprojectable(c, own_claim);
    end if;
    return query
        select u.seq::text || suffix, u.seq, coalesce(m.topic, r.topic),
               case when l.keys is null then m.key else u.key end,
               case when c.config ? 'columns'
                    then project(coalesce(r.data, m.data), c.config -> 'columns')
                    else coalesce(r.data, m.data) end,
               l.deliver_count, l.not_visible_until, coalesce(m.commit_lsn, r.commit_lsn),
               coalesce(m.ordinal, r.ordinal), coalesce(m.commit_time, r.commit_time),
               coalesce(m.inserted_at, r.inserted_at)
        from leases l
        cross join lateral unnest(l.seqs, l.keys) with ordinality as u (seq, key, n)
        -- Look-up fences.
        left join lateral (
            select * from messages m
            where m.seq = u.seq and m.seq between lowest and highest limit 1) m on true
        left join lateral (
            select * from redriven r where r.consumer_id = c.id and r.seq = u.seq limit 1) r on true
        where l.consumer_id = c.id and l.claim_id = own_claim
          and not exists (select from settled s
                          where s.consumer_id = c.id and s.claim_id = own_claim and s.part = l.part
                            and s.seq = u.seq)
        order by l.part, u.n;
end $$;
