-- dead_letters(consumer, ids, topic, key, reason, at_most) -> its dead letters, the newest first, of these (null: any); reason is how theirs
-- begin. Raises CB001, CB002, CB007 (an id that is no dead letter of this consumer), CB008.
create or replace function dead_letters(consumer text, ids bigint[] default null, topic text default null, key text default null,
                                        reason text default null, at_most bigint default null) returns setof dead_messages
language plpgsql volatile security definer set search_path from current set jit = off as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    if $2 is not null then
        perform refuse_unknown_dead(c, $2);
    end if;
    return query
        select d.* from dead_messages d
        where d.consumer_id = c.id and ($2 is null or d.id = any ($2)) and ($3 is null or d.topic = $3)
          and ($4 is null or d.key = $4) and ($5 is null or starts_with(d.reason, $5))
        order by d.id desc limit $6;
end $$;
