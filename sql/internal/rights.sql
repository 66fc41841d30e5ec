-- Who may call what. A role with usage on the schema and nothing else can receive, ack and so on, for the consumers whose role it
-- is: these functions run with their owner's rights. A consumer that names no role is read by the store's owner alone.

-- public_functions() -> those that anybody who may use the schema can call. They pin their search_path, or are inlined. All others are
-- called by these, by the bridge and by the owner, and by nobody else. publish() waits for a grant of its own.
create or replace function public_functions() returns text[]
language sql immutable set search_path from current as $$
    select '{receive,peek,ack,nack,extend,give_back,nack_failed,redrive,purge,consumer_lag,consumer_holders,
             show_consumer,dead_letters,dead_ids,dead_to_compare,redrive_compared,queue_settings,next_visible,
             read_stream,commit_offset,extend_lease,seek,seek_partitions,peek_stream,time_of,group_lag,stream_settings,next_readable,
             register_sequence_transaction,max_safe_seq,draw,
             draw_lock,low_half}'::text[]
$$;

-- restrict_rights(): as public_functions() says. Explicit grants stay.
create or replace function restrict_rights() returns void
language plpgsql set search_path from current as $$
declare
    name text;
begin
    execute format('revoke execute on all functions in schema %I from public', current_schema());
    for name in select p.oid::regprocedure from pg_proc p
                where p.pronamespace = current_schema()::regnamespace and p.proname = any (public_functions())
    loop
        execute format('grant execute on function %s to public', name);
    end loop;
end $$;

-- may_read(role) -> whether the caller may read a consumer of this role (null: of none): a member of the role, or of the store's owner. A
-- consumer of none may also be read by a role that has been granted UPDATE on the table of consumers, such as an operator's. Who
-- calls is the session's user, or whom it has set its role to: current_user is the owner in a function with the owner's rights.
create or replace function may_read(role text) returns boolean
language sql stable as $$
    select case when role is null then has_table_privilege(c.name, 'consumers', 'update')
                else coalesce(pg_has_role(c.name, to_regrole(quote_ident(role)), 'member'), false) end
        or pg_has_role(c.name, current_user, 'member')
    from (select case when current_setting('role') = 'none' then session_user
                      else current_setting('role')::name end as name) c
$$;

-- use_role(role): lets a consumer's role in, as far as the functions. Raises CB004 where there is no such role.
create or replace function use_role(role text) returns void
language plpgsql set search_path from current as $$
begin
    if to_regrole(quote_ident(role)) is null then
        raise exception 'no role named %', quote_literal(role) using errcode = 'CB004',
            hint = format('Make it: create role %I login', role);
    end if;
    execute format('grant usage on schema %I to %I', current_schema(), role);
end $$;
