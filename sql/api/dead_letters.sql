-- dead_letters(consumer, ids, topic, key, reason, at_most): list dead letters, the newest first.
--
-- A filter that is null matches every dead letter.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   ids       only these dead letters
--   topic     only dead letters of this topic
--   key       only dead letters with this key
--   reason    only dead letters whose reason begins with this text
--   at_most   the most rows to return, or null for all
-- Returns: rows of the table dead_messages.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB007  an id is not that of a dead letter of this consumer
--   CB008  the caller may not read this consumer
-- Example:
--   select id, topic, key, reason from cdcbridge.dead_letters('billing', at_most => 20);
create or replace function dead_letters(consumer text, ids bigint[] default null,
                                        topic text default null, key text default null,
                                        reason text default null, at_most bigint default null)
returns setof dead_messages
language plpgsql volatile security definer set search_path from current set jit = off as $$
#variable_conflict use_column
declare
    c consumers := letters_named(consumer);
begin
    if $2 is not null then
        perform refuse_unknown_dead(c, $2);
    end if;
    return query
        select d.* from dead_messages d
        where d.consumer_id = c.id and ($2 is null or d.id = any ($2))
          and ($3 is null or d.topic = $3) and ($4 is null or d.key = $4)
          and ($5 is null or starts_with(d.reason, $5))
        order by d.id desc limit $6;
end $$;
