-- Looking up the consumer that a call names, and checking that the caller may read it. Checks that
-- several functions share.

-- consumer_named(name) -> the row of the consumer with this name.
--
-- Raises:
--   CB001  no consumer has that name (the hint lists those that the caller may read)
create or replace function consumer_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers;
begin
    select * into found from consumers c where c.name = consumer_named.name;
    if found.id is null then
        raise exception 'there is no consumer named %', quote_nullable(name)
            using errcode = 'CB001',
                  hint = coalesce(
                      'Known: ' || (select string_agg(c.name, ', ' order by c.name) from consumers c
                                    where may_read(c.config ->> 'role')),
                      'This role may read no consumer. '
                          '`cdcbridge consumers apply` adds those of the configuration file.');
    end if;
    return found;
end $$;

-- queue_named(name) -> the row of the queue or fifo consumer with this name.
--
-- Raises:
--   CB001  no consumer has that name
--   CB002  the consumer is a stream, which has no queue
--   CB008  the caller may not read the consumer
create or replace function queue_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers;
begin
    select * into found from consumers c where c.name = queue_named.name;
    -- Every call passes here, so one condition selects the calls that need a closer check. A
    -- session of the owner needs none, unless the consumer has a role.
    if found.id is null or found.mode = 'stream' or found.config ? 'role'
        or session_user <> current_user or current_setting('role') <> 'none'
    then
        perform refuse_queue(consumer_named(name));
    end if;
    return found;
end $$;

-- refuse_queue(consumer): Raise the errors of queue_named() for a consumer that exists.
--
-- Raises:
--   CB002  the consumer is a stream or a mirror
--   CB008  the caller may not read the consumer
create or replace function refuse_queue(consumer consumers) returns void
language plpgsql stable as $$
begin
    if consumer.mode = 'stream' and consumer.config ? 'sink' then
        raise exception 'consumer % is a stream, which its sink delivers in order',
            quote_literal(consumer.name)
            using errcode = 'CB002', hint =
                'To send a dead letter again, write its row or publish its message once more. '
                'docs/SINKS.md has an example.';
    end if;
    perform refuse_mirror(consumer);
    if consumer.mode = 'stream' then
        raise exception 'consumer % reads the log as a stream', quote_literal(consumer.name)
            using errcode = 'CB002', hint =
    'Read it with read_stream(), with Stream.connect() in Python, or with `cdcbridge read`.';
    end if;
    perform refuse_stranger(consumer);
end $$;

-- refuse_mirror(consumer): Raise an error if the consumer belongs to a mirror.
--
-- The mirror's process alone reads its messages and moves its offset.
-- Raises: CB002
create or replace function refuse_mirror(consumer consumers) returns void
language plpgsql stable as $$
begin
    if consumer.config ? 'mirror' then
        raise exception 'consumer % is a mirror, whose messages cdcbridge applies to its target',
            quote_literal(consumer.name)
            using errcode = 'CB002', hint = format('`cdcbridge mirror show %s` shows it. For the '
                'messages, add a consumer with the same tables.', consumer.name);
    end if;
end $$;

-- refuse_stranger(consumer): Raise an error if the caller may not read the consumer.
--
-- The store's owner may read every consumer, and the members of a consumer's role may read that
-- consumer. A role with UPDATE on the table consumers may also read the consumers without a role.
-- Raises:
--   CB008  may_read() is false for the consumer's role, or for a consumer without a role
create or replace function refuse_stranger(consumer consumers) returns void
language plpgsql stable as $$
begin
    if may_read(consumer.config ->> 'role') then
        return;
    elsif consumer.config ? 'role' then
        raise exception 'consumer % may be read by the role % alone', quote_literal(consumer.name),
            quote_ident(consumer.config ->> 'role')
            using errcode = 'CB008', hint = 'Connect as that role, or as the owner of the store.';
    end if;
    raise exception 'consumer % names no role, so only the store''s owner % may read it',
        quote_literal(consumer.name), quote_ident(current_user)
        using errcode = 'CB008',
              hint = 'Set its role in the configuration file, for example role: billing_app.';
end $$;

-- letters_named(name) -> the row of a consumer that can have dead letters: every consumer but a
-- stream without a sink.
--
-- Raises: as queue_named() does.
create or replace function letters_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers := consumer_named(name);
begin
    if found.mode = 'stream' and not found.config ? 'sink' then
        perform refuse_queue(found);
    end if;
    perform refuse_stranger(found);
    return found;
end $$;

-- stream_named(name, mirrors) -> the row of the stream consumer with this name.
--
-- Raises:
--   CB001  no consumer has that name
--   CB002  the consumer is a queue or fifo consumer, or a mirror unless `mirrors` is true
--   CB008  the caller may not read the consumer
create or replace function stream_named(name text, mirrors boolean default false)
returns consumers
language plpgsql stable as $$
declare
    found consumers := consumer_named(name);
begin
    if found.mode <> 'stream' then
        raise exception 'consumer % is a %, not a stream', quote_literal(name), found.mode
            using errcode = 'CB002', hint =
            'Read it with receive(), with Queue.connect() in Python, or with `cdcbridge receive`.';
    end if;
    if not mirrors then
        perform refuse_mirror(found);
    end if;
    perform refuse_stranger(found);
    return found;
end $$;

-- check_max_messages(max_messages): Check the argument of receive() and of read_stream().
--
-- Raises:
--   CB004  max_messages is null or below 1
create or replace function check_max_messages(max_messages int) returns void
language plpgsql immutable as $$
begin
    if max_messages is null or max_messages < 1 then
        raise exception 'max_messages is %, but must be at least 1',
            coalesce(max_messages::text, 'null')
            using errcode = 'CB004';
    end if;
end $$;
