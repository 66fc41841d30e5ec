-- live_waiting___id__(hint) -> the rows of waiting, in the order of (ord, tie).
--
-- The rows are produced one by one, as the caller fetches them: first the rows that claims have
-- passed by, each by a look-up, then the rows from the floor on, along the index. The function has
-- no SET clause, so PostgreSQL inlines it.
create or replace function live_waiting___id__(hint hints) returns setof waiting___id__
language sql stable as $$
    select w.* from unnest(($1).passed) as p (ord) cross join lateral (
        select * from waiting___id__ w
        where w.consumer_id = __id__ and w.ord = p.ord order by w.tie offset 0) w
    union all
    (select w.* from waiting___id__ w where w.consumer_id = __id__ and w.ord >= ($1).waiting_floor
     order by w.ord, w.tie)
$$;

-- find_floor___id__(hint, cut) -> a better floor than the one of the hint, if there is one.
--
-- The floor is the first row at or after `cut`. The rows before it are those that claims have
-- passed by. If there are more than 1,000 of them, the floor remains before `cut`.
-- Returns: the floor, and in passed the ords of the rows below it
create or replace function find_floor___id__(hint hints, cut bigint, out passed bigint[],
                                             out floor bigint)
language plpgsql stable as $$
declare
    most constant int := 1000;
begin
    cut := greatest(cut, hint.waiting_floor);
    passed := array(select w.ord from live_waiting___id__(hint) w where w.ord < cut limit most + 1);
    if cardinality(passed) > most then
        floor := greatest(passed[most + 1], hint.waiting_floor);
    else
        floor := coalesce((select w.ord from waiting___id__ w
                           where w.consumer_id = __id__ and w.ord >= cut
                           order by w.ord limit 1), cut);
    end if;
    passed := array(select distinct p from unnest(passed) p where p < floor order by p);
end $$;
