-- Backfills: the requests and their progress. The bridge reads the rows from the source.

-- start_backfill(consumer, table_name, condition, columns, rate, after_seq) -> the backfill's id.
--
-- The bridge begins the backfill within a second.
--
-- Raises:
--   CB001  unknown consumer
--   CB004  a backfill of this table for this consumer is unfinished
create or replace function start_backfill(consumer text, table_name text,
                                          condition text default null,
                                          columns text[] default null, rate int default null,
                                          after_seq bigint default null) returns int
language plpgsql volatile set search_path from current as $$
declare
    c constant consumers := consumer_named(consumer);
    made int;
begin
    insert into backfills (consumer_id, table_name, condition, columns, rate, after_seq)
    values (c.id, table_name, condition, columns, rate, after_seq) returning id into made;
    return made;
exception
    when unique_violation then
        raise exception 'a backfill of % into consumer % has not ended yet',
            quote_literal(table_name), quote_literal(c.name)
            using errcode = 'CB004', hint = format(
            '`cdcbridge backfill list %s` shows it. `cdcbridge backfill cancel %1$s %s` ends it.',
            c.name, table_name);
end $$;

-- change_backfills(consumer, table_name, states, state) -> the number of backfills changed.
--
-- Backfills of the consumer that are in one of the states are put into the given state. If
-- table_name is null, backfills of all tables are changed.
--
-- Raises:
--   CB001  unknown consumer
--   CB004  no such backfill is in one of these states
create or replace function change_backfills(consumer text, table_name text, states text[],
                                            state text) returns int
language plpgsql volatile set search_path from current as $$
declare
    c constant consumers := consumer_named(consumer);
    changed int;
begin
    update backfills b
    set state = change_backfills.state, note = null,
        finished_at = case when change_backfills.state = 'cancelled' then moment() end
    where b.consumer_id = c.id and b.state = any (states)
      and (change_backfills.table_name is null or b.table_name = change_backfills.table_name);
    get diagnostics changed = row_count;
    if changed = 0 then
        raise exception 'consumer % has no backfill%that is %', quote_literal(c.name),
            coalesce(' of ' || quote_literal(table_name) || ' ', ' '),
            array_to_string(states, ' or ')
            using errcode = 'CB004',
                  hint = format('`cdcbridge backfill list %s` shows its backfills.', c.name);
    end if;
    return changed;
end $$;

-- put_progress(backfill_id, place, done, sent, finished, early): Store how far a backfill is.
--
-- The bridge calls it in the transaction that appends the rows.
--
-- Parameters:
--   place     the key of the last row that was read
--   done      the number of rows read since the last call
--   sent      the number of these rows that became messages
--   finished  whether the backfill is complete
--   early     with the first rows, the keys whose changes arrived before them; later null, which
--             changes nothing
create or replace function put_progress(backfill_id int, place jsonb, done bigint, sent bigint,
                                        finished boolean, early jsonb) returns void
language plpgsql volatile set search_path from current as $$
declare
    before constant backfill_progress := newest_progress(backfill_id);
begin
    insert into backfill_progress (backfill_id, place, done, sent)
    values (backfill_id, place, coalesce(before.done, 0) + done, coalesce(before.sent, 0) + sent);
    delete from backfill_progress p where p.backfill_id = before.backfill_id and p.id = before.id;
    if early is not null then
        update backfills b set early = put_progress.early where b.id = put_progress.backfill_id;
    end if;
    if finished then
        update backfills b set state = 'done', note = null, finished_at = moment()
        where b.id = put_progress.backfill_id and b.state in ('waiting', 'running', 'paused');
    end if;
end $$;

-- forget_beginnings(kept): Let unfinished and failed backfills skip no rows from now on.
--
-- A backfill skips rows that its consumer already received as changes. A consumer that did not
-- receive all changes since its backfill began may have missed some, so its backfills must skip
-- nothing. kept contains the ids of the consumers that received all changes.
create or replace function forget_beginnings(kept int[]) returns void
language sql volatile set search_path from current as $$
    update backfills b set since = null, early = null, after_seq = null
    where b.state in ('waiting', 'running', 'paused', 'failed') and b.consumer_id <> all (kept)
$$;

-- changed_behind(topic, seq, operations, most) -> up to `most` keys that were changed after seq.
--
-- These are the keys of the changes, and the former keys of updates that changed a key.
create or replace function changed_behind(topic text, seq bigint, operations text[], most int)
returns setof text
language sql stable set search_path from current as $$
    select distinct k.key from messages m cross join lateral (values (m.key), (m.old_key)) k (key)
    where m.seq > $2 and m.topic = $1 and m.reader is null and op_of(m.data) = any ($3)
      and k.key is not null
    limit $4
$$;

-- truncates(topic) -> the ids of the transactions whose TRUNCATE of this table is in the log.
--
-- They are transaction ids of 32 bits, without the epoch.
create or replace function truncates(topic text) returns setof bigint
language sql stable set search_path from current as $$
    select m.xid from messages m
    where m.topic = $1 and m.xid is not null and m.key is null and op_of(m.data) = 'truncate'
$$;

-- newest_progress(backfill_id) -> the latest progress of the backfill; null before its first rows.
create or replace function newest_progress(backfill_id int) returns backfill_progress
language sql stable as $$
    select p from backfill_progress p where p.backfill_id = $1 order by p.id desc limit 1
$$;

-- backfill_status(consumer) -> a row per backfill of the consumer, the latest backfill last.
--
-- A null consumer means all consumers. percent and seconds_left are estimates, and null if nothing
-- is known.
-- Raises: CB001 if the consumer is unknown.
create or replace function backfill_status(consumer text default null)
returns table (id int, consumer text, table_name text, state text, note text, rows bigint,
               messages bigint, total bigint, percent float8, rows_per_second float8,
               seconds_left float8, condition text, created_at timestamptz, finished_at timestamptz)
language sql volatile set search_path from current as $$
    select b.id, c.name, b.table_name, b.state, b.note, coalesce(p.done, 0), coalesce(p.sent, 0),
           b.total,
           case when b.state = 'done' then 100
                when b.total > 0 then least(99, 100.0 * coalesce(p.done, 0) / b.total) end,
           p.done / s.seconds,
           case when b.state = 'running' and b.total > p.done
                then (b.total - p.done) / (p.done / s.seconds) end,
           b.condition, b.created_at, b.finished_at
    from backfills b join consumers c on c.id = b.consumer_id
    left join lateral newest_progress(b.id) p on true
    cross join lateral (
        select nullif(extract(epoch from coalesce(b.finished_at, moment()) - b.started_at)::float8,
                      0) as seconds) s
    where c.id = coalesce((select (consumer_named($1)).id where $1 is not null), c.id)
    order by b.id
$$;
