-- The event trigger that gives new tables of the source a replica identity.
--
-- It is installed in the source database with `source.event_trigger: true`, or by hand.
-- `cdcbridge check --fixes` prints this file.
--
-- PostgreSQL refuses UPDATE and DELETE of a table that is published with these operations and has
-- no replica identity. A wildcard such as "public.*" publishes tables that do not exist yet.
-- Therefore a table that matches one and is created without a primary key gets REPLICA IDENTITY
-- FULL in the transaction that creates it. When the table gets a primary key, its replica identity
-- becomes DEFAULT.
--
-- Nothing here makes a statement of an application fail: each error becomes a warning.

create schema if not exists cdcbridge_identity;
comment on schema cdcbridge_identity is 'cdcbridge event trigger 2';

-- A row per bridge: the tables whose updates and deletes the bridge takes.
--   everything  all tables
--   schemas     schemas of which it takes all tables
--   tables      partitioned tables by name, for example public.orders: their partitions are covered
--   own_schema  the schema of the bridge's store. Its tables and those of its internal schema are
--               left out.
--   by_run      `cdcbridge run` inserted the row, and removes it again
create table if not exists cdcbridge_identity.bridges (
    slot text primary key,
    everything boolean not null,
    schemas text[] not null,
    tables text[] not null,
    own_schema text not null,
    by_run boolean not null
);
-- The tables that got REPLICA IDENTITY FULL from this trigger.
--   before  the value of pg_class.relreplident before that, for `cdcbridge uninstall`
create table if not exists cdcbridge_identity.changed (relation oid primary key);
alter table cdcbridge_identity.changed add column if not exists before text not null default 'd';

-- taken(relation) -> whether a bridge takes updates or deletes of this table, or of a table of
-- which it is a partition.
create or replace function cdcbridge_identity.taken(relation oid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
    select exists (
        select from (select relation
                     union all select relid from pg_partition_ancestors(relation)) a (oid)
        join pg_class c on c.oid = a.oid
        join pg_namespace n on n.oid = c.relnamespace
        join cdcbridge_identity.bridges b
          on b.everything or n.nspname = any (b.schemas)
             or n.nspname || '.' || c.relname = any (b.tables)
        where n.nspname not in (b.own_schema, b.own_schema || '_internal', 'information_schema')
          and n.nspname !~ '^pg_'
    )
$$;

-- mend(relations): Correct the replica identity of these tables and of their partitions.
--
-- If relations is null, all tables are corrected. An error becomes a warning.
-- Locks: ACCESS EXCLUSIVE on each table that it changes. It waits at most one second for each lock.
create or replace function cdcbridge_identity.mend(relations oid[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set lock_timeout = '1s' as $$
declare
    found_table record;
begin
    for found_table in
        with looked_at as (
            select unnest(relations) as oid
            union select p.relid from unnest(relations) r (oid), pg_partition_tree(r.oid) p
            union select oid from pg_class where relations is null
        ), shape as (
            select c.oid, n.nspname, c.relname, c.relreplident,
                   -- The conditions are those of the server, in RelationGetIndexList().
                   exists (select from pg_index i
                           where i.indrelid = c.oid and i.indisvalid and i.indislive
                           and i.indimmediate and i.indisprimary) as keyed,
                   exists (select from pg_index i
                           where i.indrelid = c.oid and i.indisvalid and i.indislive
                           and i.indimmediate and i.indisreplident) as chosen,
                   exists (select from cdcbridge_identity.changed x
                           where x.relation = c.oid and x.before <> 'n') as ours
            from looked_at l join pg_class c using (oid)
            join pg_namespace n on n.oid = c.relnamespace
            where c.relkind in ('r', 'p') and c.relpersistence = 'p' and n.nspname !~ '^pg_'
        )
        select s.*, case when relreplident = 'f' then 'default' else 'full' end as wanted
        from shape s
        where case relreplident
                  when 'f' then ours and keyed
                  when 'd' then not keyed
                  when 'i' then not chosen
                  else true
              end
          and cdcbridge_identity.taken(s.oid)
    loop
        begin
            execute format(
                'alter table only %I.%I replica identity %s',
                found_table.nspname, found_table.relname, found_table.wanted
            );
            if found_table.wanted = 'default' then
                delete from cdcbridge_identity.changed where relation = found_table.oid;
            else
                insert into cdcbridge_identity.changed
                values (found_table.oid, found_table.relreplident)
                on conflict do nothing;
            end if;
        exception when others then
            raise warning 'cdcbridge could not set the replica identity of %.%: %',
                found_table.nspname, found_table.relname, sqlerrm
                using hint = 'Give the table a primary key. '
                    'Without one, UPDATE and DELETE of it may fail.';
        end;
    end loop;
end $$;

-- on_command(): Correct the tables that a command has created or altered, when the command ends.
create or replace function cdcbridge_identity.on_command() returns event_trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform cdcbridge_identity.mend(array(
        select distinct objid from pg_event_trigger_ddl_commands()
        where classid = 'pg_class'::regclass
    ));
exception when others then
    raise warning 'cdcbridge could not correct the replica identities of tables: %', sqlerrm
        using hint = 'Give each new table a primary key, or REPLICA IDENTITY FULL.';
end $$;

-- on_drop(): Correct all tables after a key or an index was dropped.
--
-- The event does not name the table to which the key or the index belonged.
create or replace function cdcbridge_identity.on_drop() returns event_trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    if exists (
        select from pg_event_trigger_dropped_objects() d
        where not d.is_temporary
          and (d.object_type in ('table constraint', 'index', 'table column'))
    ) then
        perform cdcbridge_identity.mend(null);
    end if;
    delete from cdcbridge_identity.changed x
    using pg_event_trigger_dropped_objects() d
    where d.objid = x.relation and d.classid = 'pg_class'::regclass and d.objsubid = 0;
exception when others then
    raise warning 'cdcbridge could not correct the replica identities of tables: %', sqlerrm
        using hint = 'Give each new table a primary key, or REPLICA IDENTITY FULL.';
end $$;

drop event trigger if exists cdcbridge_identity_command;
create event trigger cdcbridge_identity_command on ddl_command_end
    when tag in ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO', 'ALTER TABLE', 'CREATE SCHEMA',
                 'IMPORT FOREIGN SCHEMA')
    execute function cdcbridge_identity.on_command();
alter event trigger cdcbridge_identity_command enable always;
drop event trigger if exists cdcbridge_identity_drop;
create event trigger cdcbridge_identity_drop on sql_drop
    execute function cdcbridge_identity.on_drop();
alter event trigger cdcbridge_identity_drop enable always;

grant usage on schema cdcbridge_identity to public;
grant select on cdcbridge_identity.bridges to public;
revoke all on function cdcbridge_identity.taken, cdcbridge_identity.mend from public;
