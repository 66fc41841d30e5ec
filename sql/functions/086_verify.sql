-- Verification: the state that the log's messages of a table lead to, to be compared with the table.

-- log_state(topic, xmax, running) -> each key's record, folded from reads and changes by transactions that a snapshot of the source
-- sees: those before xmax that were not running. Both are transaction IDs less their epoch.
create or replace function log_state(topic text, xmax bigint, running bigint[]) returns table (key text, record jsonb)
language plpgsql volatile
set search_path from current set jit = off set work_mem = '128MB' as $$
#variable_conflict use_column
begin
    create temp table folded on commit drop as
    with seen as materialized (
        select m.seq, m.key, m.old_key, m.data ->> 'op' as op, (m.data -> 'unchanged')::text <> '[]' as partial
        from messages m
        where m.topic = log_state.topic
          and (m.xid is null or (m.xid - log_state.xmax + 4294967296) % 4294967296 >= 2147483648 and m.xid <> all (running))
          and (m.reader is null
               or not exists (select from consumers c where c.id = m.reader
                              and not c.config -> 'operations' @> '["insert", "update", "delete", "truncate"]'))
    )
    select s.* from seen s where s.seq > coalesce((select max(t.seq) from seen t where t.op = 'truncate'), 0);
    create index on pg_temp.folded (key, seq);
    analyze pg_temp.folded;
    return query
        select l.key, case when l.partial then fold_back(l.key, l.seq) else (m.data -> 'record')::jsonb end
        from (select distinct on (e.key) e.*
              from (select f.key, f.seq, f.op <> 'delete' as there, f.partial from pg_temp.folded f
                    union all
                    select f.old_key, f.seq, false, false from pg_temp.folded f where f.old_key is not null) e
              order by e.key, e.seq desc) l
        join messages m on m.seq = l.seq
        where l.there;
    drop table pg_temp.folded;
end $$;

-- fold_back(key, seq) -> the record of the key at that message: columns that it left unchanged are those of the one before, which
-- has the row's former key where the message took that away. Reads log_state()'s table.
create or replace function fold_back(key text, seq bigint) returns jsonb
language plpgsql volatile set search_path from current as $$
declare
    whole jsonb := '{}';
    wanted text[]; -- null: all columns
    at record;
begin
    loop
        select f.seq, f.old_key, m.data into at
        from pg_temp.folded f join messages m on m.seq = f.seq
        where f.key = fold_back.key and f.seq <= fold_back.seq and f.op <> 'delete' order by f.seq desc limit 1;
        exit when not found;
        whole := coalesce((select jsonb_object_agg(r.key, r.value) from json_each(at.data -> 'record') r
                           where wanted is null or r.key = any (wanted)), '{}') || whole;
        wanted := array(select u from json_array_elements_text(at.data -> 'unchanged') u where wanted is null or u = any (wanted));
        exit when wanted = '{}';
        key := coalesce(at.old_key, key);
        seq := at.seq - 1;
    end loop;
    return whole;
end $$;

-- log_hashes(topic, xmax, running) -> of log_state(), by bucket: how many keys, and a sum over their records that does not go by order.
create or replace function log_hashes(topic text, xmax bigint, running bigint[])
returns table (bucket int, keys bigint, hash numeric)
language sql volatile set search_path from current as $$
    select ('x' || left(md5(s.key), 3))::bit(12)::int, count(*), sum(('x' || left(md5(s.key || s.record), 15))::bit(60)::bigint)
    from log_state($1, $2, $3) s group by 1
$$;
