-- The consumer that a call names, and whether the caller may use it.

-- consumer_named(name) -> the consumer's row.
-- Raises CB001 where no consumer has that name. Its hint names the consumers that the caller may read, and no others.
create or replace function consumer_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers;
begin
    select * into found from consumers c where c.name = consumer_named.name;
    if found.id is null then
        raise exception 'no consumer named %', quote_nullable(name)
            using errcode = 'CB001',
                  hint = coalesce('Known: ' || (select string_agg(c.name, ', ' order by c.name) from consumers c
                                                where may_read(c.config ->> 'role')),
                                  'No consumer has been applied yet, or none that this role may read.');
    end if;
    return found;
end $$;

-- queue_named(name) -> the consumer's row, which must be one that is read message by message.
-- Raises CB001 (unknown), CB002 (a stream consumer has no queue), CB008 (not its role).
create or replace function queue_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers;
begin
    select * into found from consumers c where c.name = queue_named.name;
    -- One look for all: this is on the way of every call. The owner's own session needs no closer look.
    if found.id is null or found.mode = 'stream' or found.config ? 'role' or session_user <> current_user
        or current_setting('role') <> 'none'
    then
        perform refuse_queue(consumer_named(name));
    end if;
    return found;
end $$;

-- refuse_queue(consumer): raises what queue_named() does, where there is something to raise.
create or replace function refuse_queue(consumer consumers) returns void
language plpgsql stable as $$
begin
    if consumer.mode = 'stream' then
        raise exception 'consumer % reads the log as a stream', quote_literal(consumer.name)
            using errcode = 'CB002', hint = 'A stream is read by read_stream(), by Stream.connect() in Python, and by `cdcbridge read`.';
    end if;
    perform refuse_stranger(consumer);
end $$;

-- refuse_stranger(consumer): raises CB008 where the consumer names a role that is not the caller's, or none, and the caller is not
-- the store's owner.
create or replace function refuse_stranger(consumer consumers) returns void
language plpgsql stable as $$
begin
    if may_read(consumer.config ->> 'role') then
        return;
    elsif consumer.config ? 'role' then
        raise exception 'consumer % may be read by the role % alone', quote_literal(consumer.name),
            quote_ident(consumer.config ->> 'role')
            using errcode = 'CB008';
    end if;
    raise exception 'consumer % names no role, so only the store''s owner % may read it', quote_literal(consumer.name),
        quote_ident(current_user)
        using errcode = 'CB008', hint = 'Set its role in the configuration file, for example role: billing_app.';
end $$;

-- stream_named(name) -> the consumer's row, which must be one that reads the log.
-- Raises CB001 (unknown), CB002 (a queue), CB008 (not its role).
create or replace function stream_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers := consumer_named(name);
begin
    if found.mode <> 'stream' then
        raise exception 'consumer % is a %, not a stream', quote_literal(name), found.mode
            using errcode = 'CB002', hint = 'It is read by receive(), by Queue.connect() in Python, and by `cdcbridge receive`.';
    end if;
    perform refuse_stranger(found);
    return found;
end $$;
