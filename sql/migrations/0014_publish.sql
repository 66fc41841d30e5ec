-- publish() takes jsonb and a delay. Its old form goes, and whoever had the right to call that may call the new one.
do $$
declare
    old constant regprocedure := to_regprocedure(format('%I.publish(text, text, json, timestamptz, text)', current_schema()));
    allowed record;
begin
    if old is null then
        return; -- a new store
    end if;
    -- Its code comes with this version's functions, which replace this body and keep the rights.
    create function publish(topic text, key text, data anycompatible, deliver_at timestamptz default null,
                            dedup_id text default null, delay interval default null) returns bigint
    language sql as 'select null::bigint';
    revoke execute on function publish(text, text, anycompatible, timestamptz, text, interval) from public;
    for allowed in
        select case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end as name, a.is_grantable
        from pg_proc p cross join lateral aclexplode(p.proacl) a
        where p.oid = old and a.grantee <> p.proowner
    loop
        execute format('grant execute on function publish(text, text, anycompatible, timestamptz, text, interval) to %s%s',
                       allowed.name, case when allowed.is_grantable then ' with grant option' else '' end);
    end loop;
    execute format('drop function %s', old);
end $$;
drop function if exists check_publish(text, timestamptz, text), time_of(text);
