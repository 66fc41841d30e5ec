-- Rights: which roles may call which functions.
--
-- A role needs only USAGE on the schema to receive from, ack for and otherwise use the consumers
-- that name it as their role. The functions that it calls run with the rights of their owner. A
-- consumer that names no role can be used only by the owner of the store.

-- public_functions() -> the functions that every role with USAGE on the schema may call.
--
-- These functions pin their search_path, or are inlined. All other functions are called only by
-- these functions, the bridge and the owner. publish() is not among them: it needs a grant of its
-- own.
create or replace function public_functions() returns text[]
language sql immutable set search_path from current as $$
    select '{receive,peek,ack,nack,extend,give_back,nack_failed,redrive,purge,
             consumer_lag,consumer_holders,show_consumer,dead_letters,dead_ids,
             dead_to_compare,redrive_compared,queue_settings,next_visible,read_stream,
             commit_offset,extend_lease,seek,seek_partitions,peek_stream,time_of,group_lag,
             stream_settings,next_readable,register_sequence_transaction,max_safe_seq,draw,
             draw_lock,low_half}'::text[]
$$;

-- restrict_rights(): Let PUBLIC execute the public functions, and no others.
--
-- Grants to single roles are kept.
create or replace function restrict_rights() returns void
language plpgsql set search_path from current as $$
declare
    name text;
begin
    execute format('revoke execute on all functions in schema %I from public', current_schema());
    for name in select p.oid::regprocedure from pg_proc p
                where p.pronamespace = current_schema()::regnamespace
                  and p.proname = any (public_functions())
    loop
        execute format('grant execute on function %s to public', name);
    end loop;
end $$;

-- may_read(role) -> whether the caller may use a consumer with this role; null: one without a role.
--
-- Allowed are members of the role, and members of the store's owner. A consumer without a role may
-- also be used by a role that has UPDATE on the table consumers, for example an operator's role.
--
-- The caller is the session's user, or the role that the session has set. It is not current_user,
-- which is the owner in a function that runs with the owner's rights.
create or replace function may_read(role text) returns boolean
language sql stable as $$
    select case when role is null then has_table_privilege(c.name, 'consumers', 'update')
                else coalesce(pg_has_role(c.name, to_regrole(quote_ident(role)), 'member'),
                              false) end
        or pg_has_role(c.name, current_user, 'member')
    from (select case when current_setting('role') = 'none' then session_user
                      else current_setting('role')::name end as name) c
$$;

-- use_role(role): Grant USAGE on the schema to a consumer's role.
--
-- With it, the role can call the public functions.
-- Raises: CB004 if there is no such role.
create or replace function use_role(role text) returns void
language plpgsql set search_path from current as $$
begin
    if to_regrole(quote_ident(role)) is null then
        raise exception 'no role named %', quote_literal(role) using errcode = 'CB004',
            hint = format('Make it: create role %I login', role);
    end if;
    execute format('grant usage on schema %I to %I', current_schema(), role);
end $$;
