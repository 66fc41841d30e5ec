-- Consumers: made, removed, and the code that each has for itself.

-- add_consumer(name, mode, config) → its id. Makes its partitions and its claim function.
create or replace function add_consumer(name text, mode text, config jsonb) returns int
language plpgsql set search_path from current as $$
declare
    new_id int;
begin
    insert into consumers (name, mode, config) values (name, mode, config) returning id into new_id;
    execute format('create table %I partition of waiting for values in (%s)
                    with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
                          autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off)', 'waiting_' || new_id, new_id);
    if mode = 'fifo' then
        execute format('create index %I on %I (ord, tie) where barrier', 'barriers_' || new_id, 'waiting_' || new_id);
        execute format('create index %I on %I (not_before) where not_before is not null',
                       'later_' || new_id, 'waiting_' || new_id);
    end if;
    execute format('create table %I partition of dead_messages for values in (%s)', 'dead_messages_' || new_id, new_id);
    insert into hints (consumer_id, waiting_floor, token_floor, tokens) values (new_id, 0, 0, '{}');
    perform make_consumer_code(new_id);
    return new_id;
end $$;

-- make_consumer_code(id): the functions that work on the consumer's own partition. Static SQL on a table of its own is
-- planned once a session; on the partitioned table every call would lock all partitions, or be planned anew.
create or replace function make_consumer_code(id int) returns void
language plpgsql set search_path from current as $$
begin
    execute replace(live_waiting_template(), '<id>', id::text);
    execute replace(claim_waiting_template(), '<id>', id::text);
    execute replace(claim_in_order_template(), '<id>', id::text);
end $$;

-- make_code(): the same for all consumers, when this version's functions replace another's.
create or replace function make_code() returns void
language sql set search_path from current as $$
    select make_consumer_code(id) from consumers
$$;

-- remove_consumer(name): the consumer, what waits for it, what it has in flight and its dead letters are gone at once.
-- Raises CB001.
create or replace function remove_consumer(name text) returns void
language plpgsql set search_path from current as $$
declare
    consumer consumers := consumer_named(name);
    code text;
begin
    for code in select p.oid::regprocedure from pg_proc p
                where p.pronamespace = current_schema()::regnamespace
                  and p.proname = any (array(
                      select f || '_' || consumer.id
                      from unnest('{live_waiting,find_floor,claim_waiting,claim_in_order,free_messages,remove_front,
                                    cut_up,claim_barrier}'::text[]) f))
    loop
        execute 'drop function ' || code;
    end loop;
    execute format('drop table %I', 'waiting_' || consumer.id);
    execute format('drop table %I', 'dead_messages_' || consumer.id);
    delete from leases where consumer_id = consumer.id;
    delete from settled where consumer_id = consumer.id;
    delete from delayed where consumer_id = consumer.id;
    delete from redriven where consumer_id = consumer.id;
    delete from hints where consumer_id = consumer.id;
    delete from consumers where id = consumer.id;
end $$;
