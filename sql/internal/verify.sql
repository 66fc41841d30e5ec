-- Verification: the rows of a table as the messages of the log describe them. `cdcbridge verify`
-- compares them with the table.

-- defused(document) -> JSON text in a form that jsonb can hold.
--
-- Escapes become plain text, and numbers with too many digits lose some. The program does the same
-- with the table's rows.
create or replace function defused(document text) returns text language sql immutable as $$
    select regexp_replace(replace(replace(document, E'\\\\', E'\\u005c'), E'\\u', E'\\\\u'),
                          '([0-9]{255}|[0-9][eE][-+]?[0-9]{3})[0-9]+', E'\\1', 'g')
$$;

-- bucket_of(key) -> the bucket of a key, one of 4,096.
--
-- It does not depend on the database's encoding.
create or replace function bucket_of(key text) returns int language sql immutable as $$
    select ('x' || left(md5(convert_to(key, 'UTF8')), 3))::bit(12)::int
$$;

-- key_in(record, columns) -> the key that a message with this record would have.
--
-- It is the text of one column, or a JSON array of several.
create or replace function key_in(record json, columns text[]) returns text
language sql immutable as $$
    select case when cardinality(columns) = 1 then record ->> columns[1]
                when bool_or(v.value is not null)
                then '[' || string_agg(coalesce(to_json(v.value)::text, 'null'), ','
                                       order by v.n) || ']' end
    from (select c.n, record ->> c.name as value from unnest(columns) with ordinality c (name, n)) v
$$;

-- log_state(topic, xmax, running, columns, harmless) -> the last record of each key.
--
-- The function combines the changes and the rows read by backfills. It takes only changes by
-- transactions that a snapshot of the source sees: transactions before xmax that are not in
-- running. Rows of backfills are left out if their consumer does not take all operations.
--
-- Parameters:
--   topic     the table, for example public.orders
--   xmax      of the snapshot, without the epoch
--   running   the transactions in progress of the snapshot, without the epoch
--   columns   the columns of the key. Messages from before the table had its key get their key
--             from these columns.
--   harmless  whether records are changed by defused()
-- Returns: xid is the transaction of a record that one change describes. It is null if several
-- changes describe the record, or a backfill read it.
create or replace function log_state(topic text, xmax bigint, running bigint[], columns text[],
                                     harmless boolean)
returns table (key text, record jsonb, xid bigint)
language plpgsql volatile
set search_path from current set jit = off set work_mem = '128MB' as $$
#variable_conflict use_column
begin
    create temp table folded on commit drop as
    with seen as materialized (
        select m.seq, coalesce(m.key, d.key) as key,
               coalesce(m.old_key, nullif(d.old_key, d.key)) as old_key,
               op_of(m.data) as op, right(m.data::text, 15) <> '"unchanged":[]}' as partial
        from messages m
        left join lateral (
            select key_in(j.data -> 'record', columns) as key,
                   key_in(j.data -> 'old', columns) as old_key
            from (select case when harmless then defused(m.data::text)::json
                              else m.data end as data) j
        ) d on m.key is null
        where m.topic = log_state.topic
          and (m.xid is null
               or (m.xid - log_state.xmax + 4294967296) % 4294967296 >= 2147483648
                  and m.xid <> all (running))
          and (m.reader is null
               or not exists (select from consumers c where c.id = m.reader
                              and not c.config -> 'operations'
                                      @> '["insert", "update", "delete", "truncate"]'))
    )
    select s.* from seen s
    where s.seq > coalesce((select max(t.seq) from seen t where t.op = 'truncate'), 0);
    -- By a hash, because a key may be too long for an index entry.
    create index on pg_temp.folded (hashtextextended(key, 0), seq);
    analyze pg_temp.folded;
    return query
        select l.key,
               case when l.partial then fold_back(l.key, l.seq, harmless)
                    else record_in(m.data, harmless)::jsonb end,
               case when not l.partial then m.xid end
        from (select distinct on (e.key) e.*
              from (select f.key, f.seq, f.op <> 'delete' as there, f.partial from pg_temp.folded f
                    union all
                    select f.old_key, f.seq, false, false
                    from pg_temp.folded f where f.old_key is not null) e
              order by e.key, e.seq desc) l
        join messages m on m.seq = l.seq
        where l.there;
    drop table pg_temp.folded;
end $$;

-- record_in(data, harmless) -> the record of a message, changed by defused() if harmless is true.
create or replace function record_in(data json, harmless boolean) returns json
language sql immutable as $$
    select case when harmless then defused(data::text)::json else data end -> 'record'
$$;

-- fold_back(key, seq, harmless) -> the complete record of the key as of the message with this seq.
--
-- Columns that the message left unchanged are taken from the message before it. If the message
-- changed the key, the message before has the row's former key. The function reads the temporary
-- table of log_state().
create or replace function fold_back(key text, seq bigint, harmless boolean) returns jsonb
language plpgsql volatile set search_path from current as $$
declare
    whole jsonb := '{}';
    wanted text[]; -- null: all columns
    document json;
    at record;
begin
    loop
        select f.seq, f.old_key, m.data into at
        from pg_temp.folded f join messages m on m.seq = f.seq
        where hashtextextended(f.key, 0) = hashtextextended(fold_back.key, 0)
          and f.key = fold_back.key
          and f.seq <= fold_back.seq and f.op <> 'delete' order by f.seq desc limit 1;
        exit when not found;
        document := case when harmless then defused(at.data::text)::json else at.data end;
        whole := coalesce((select jsonb_object_agg(r.key, r.value)
                           from json_each(document -> 'record') r
                           where wanted is null or r.key = any (wanted)), '{}') || whole;
        wanted := array(select u from json_array_elements_text(document -> 'unchanged') u
                        where wanted is null or u = any (wanted));
        exit when wanted = '{}';
        key := coalesce(at.old_key, key);
        seq := at.seq - 1;
    end loop;
    return whole;
end $$;

-- hash_of(value) -> a hash that is the same for equal values.
--
-- Trailing zeros of a number do not count, because wal2json sends 1e6 as 1000000.0.
create or replace function hash_of(value jsonb) returns text language sql immutable as $$
    select left(md5(convert_to(case when jsonb_typeof(value) = 'number'
                                    then trim_scale(value::numeric)::text else value::text end,
                               'UTF8')), 16)
$$;

-- log_hashes(topic, xmax, running, columns, harmless) -> a hash of each bucket of log_state().
--
-- keys is the number of keys in the bucket. hash is a sum over their records, so their order does
-- not matter. A row with the bucket null means that some messages have an unknown key.
create or replace function log_hashes(topic text, xmax bigint, running bigint[], columns text[],
                                      harmless boolean)
returns table (bucket int, keys bigint, hash numeric)
language sql volatile set search_path from current as $$
    select bucket_of(s.key), count(*),
           sum(('x' || left(md5(convert_to(s.key || s.record::text, 'UTF8')), 15))::bit(60)::bigint)
    from log_state($1, $2, $3, $4, $5) s group by 1
$$;

-- log_records(topic, xmax, running, columns, harmless, buckets) -> the keys of log_state() in these
-- buckets, in the order of their bytes.
--
-- hashes maps each column to the hash of its value. xid is that of log_state().
create or replace function log_records(topic text, xmax bigint, running bigint[], columns text[],
                                       harmless boolean, buckets int[])
returns table (key text, hashes json, xid bigint)
language sql volatile set search_path from current as $$
    select s.key,
           coalesce((select json_object_agg(c.key, hash_of(c.value)) from jsonb_each(s.record) c),
                    '{}'), s.xid
    from log_state($1, $2, $3, $4, $5) s
    where bucket_of(s.key) = any ($6) order by convert_to(s.key, 'UTF8')
$$;
