-- publish(topic, key, data, deliver_at, dedup_id, delay): append a message to the log.
--
-- The message is appended and fanned out to the consumers of the topic in the caller's transaction.
-- They see it when that transaction commits, and never if it does not. The caller needs the right
-- to execute this function, which no role but the owner has by default.
--
-- A message with the dedup_id of another message of the topic, published within the 5 minutes
-- before, is not appended. The call returns the seq of the first message and raises a NOTICE. For
-- programs, each call with a dedup_id sets cdcbridge.duplicate to on or off until the transaction
-- ends.
--
-- If no consumer lists the topic, a NOTICE (CB011) reports that. Consecutive calls with the same
-- topic in a transaction report it once.
--
-- Parameters:
--   topic       a name without a dot, at most 1,024 bytes
--   key         the key, which decides the order in fifo and the partition in streams, or null
--   data        json, jsonb, or a text that is JSON. The type is anycompatible, so that one
--               function takes all three, and '{"id": 1}' is a text.
--   deliver_at  not delivered before this time, at most store.max_retention from now. In fifo,
--               later messages of the key wait too.
--   dedup_id    a text of at most 1,024 bytes that marks repeated messages, or null for none
--   delay       the same as deliver_at, counted from now. Give only one of the two.
-- Returns: the seq of the message.
-- Raises:
--   CB004  topic is null, empty, contains a dot, or has more than 1,024 bytes
--   CB004  data has another type
--   CB004  deliver_at is infinite, or later than store.max_retention from now
--   CB004  delay is negative, longer than store.max_retention, or given together with deliver_at
--   CB004  dedup_id is empty or has more than 1,024 bytes
--   CB005  above READ COMMITTED: a consumer was added, changed or removed since the transaction's
--          snapshot. Run the transaction again.
--   22P02  data is a text that is not JSON
--   40001  above READ COMMITTED: another session published the dedup_id since the transaction's
--          snapshot. Run the transaction again.
--   55P03  the session's lock_timeout passed (see Locks)
--   55P03  the log has no segment for the message yet, and a transaction that creates it or locks
--          the log stays open for 5 s
-- Locks: the gap guard's shared lock, until the transaction ends. A second call with the dedup_id
-- of an open transaction waits for that transaction's end, because only then it is known which
-- message counts. The wait lasts as long as the session's lock_timeout allows, then it raises
-- 55P03. Without a bridge, the call that creates the log's next segment locks in the same way as
-- create_segments().
-- Example:
--   select seq, current_setting('cdcbridge.duplicate')
--   from cdcbridge.publish('invoices', '42', '{"id": 42}', dedup_id => 'i-42') seq;
create or replace function publish(topic text, key text, data anycompatible,
                                   deliver_at timestamptz default null, dedup_id text default null,
                                   delay interval default null) returns bigint
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
begin
    if pg_typeof(data) not in ('json'::regtype, 'jsonb'::regtype, 'text'::regtype) then
        perform refuse_no_json(pg_typeof(data));
    end if;
    return publish_document(topic, key, coalesce(data::json, 'null'), null, deliver_at, dedup_id,
                            delay);
end $$;
