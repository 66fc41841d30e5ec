-- Rights: which roles may call which functions.
--
-- A role needs only USAGE on the store's schema to receive from, ack for and otherwise use the
-- consumers that name it as their role. The functions that it calls run with the rights of their
-- owner. A consumer that names no role can be used only by the owner of the store.

-- The functions of sql/api and the views are in the store's schema. PUBLIC may execute these
-- functions, except publish(), which needs a grant. Everything else is in the internal schema, on
-- which no role has a right, apart from the owner. A function in sql/api that runs with the rights
-- of its caller therefore uses nothing internal.

-- store_schema() -> the name of the store's schema. It is also the channel of notifications.
--
-- current_schema() is the internal schema in an internal function with a SET clause.
create or replace function store_schema() returns name
language sql stable as $$
    select n.nspname from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where c.oid = 'consumers'::regclass
$$;

-- calling_role() -> the session's user, or the role that the session has set.
--
-- It is not current_user, which is the owner in a function that runs with the owner's rights.
create or replace function calling_role() returns name
language sql stable as $$
    select case when current_setting('role') = 'none' then session_user
                else current_setting('role')::name end
$$;

-- may_read(role) -> whether the caller may use a consumer with this role; null: one without a role.
--
-- Allowed are members of the role, and members of the store's owner. A consumer without a role may
-- also be used by a role that has UPDATE on the table consumers, for example an operator's role.
create or replace function may_read(role text) returns boolean
language sql stable as $$
    select case when role is null then has_table_privilege(c.name, 'consumers', 'update')
                else coalesce(pg_has_role(c.name, to_regrole(quote_ident(role)), 'member'),
                              false) end
        or pg_has_role(c.name, current_user, 'member')
    from calling_role() as c (name)
$$;

-- use_role(role): Grant USAGE on the store's schema to a consumer's role.
--
-- With it, the role can call the public functions.
-- Raises: CB004 if there is no such role.
create or replace function use_role(role text) returns void
language plpgsql set search_path from current as $$
begin
    if to_regrole(quote_ident(role)) is null then
        raise exception 'there is no role named %', quote_literal(role) using errcode = 'CB004',
            hint = format('Create it: create role %I login', role);
    end if;
    execute format('grant usage on schema %I to %I', store_schema(), role);
end $$;
