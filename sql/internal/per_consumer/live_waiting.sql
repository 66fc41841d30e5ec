-- live_waiting___id__(hint) -> the rows that wait, in the order of (ord, tie), row by row as they are asked for: first, by look-ups,
-- those that were passed by, then along the index. No SET clause, so that it is inlined.
create or replace function live_waiting___id__(hint hints) returns setof waiting___id__
language sql stable as $$
    select w.* from unnest(($1).passed) as p (ord) cross join lateral (
        select * from waiting___id__ w where w.consumer_id = __id__ and w.ord = p.ord order by w.tie offset 0) w
    union all
    (select w.* from waiting___id__ w where w.consumer_id = __id__ and w.ord >= ($1).waiting_floor order by w.ord, w.tie)
$$;

-- find_floor___id__(hint, cut) -> a better floor than the hint's, where there is one: the first row that waits at cut or behind it.
-- What waits before it has been passed by; where that is much, the floor stays before it.
create or replace function find_floor___id__(hint hints, cut bigint, out passed bigint[], out floor bigint)
language plpgsql stable as $$
declare
    most constant int := 1000;
begin
    cut := greatest(cut, hint.waiting_floor);
    passed := array(select w.ord from live_waiting___id__(hint) w where w.ord < cut limit most + 1);
    if cardinality(passed) > most then
        floor := greatest(passed[most + 1], hint.waiting_floor);
    else
        floor := coalesce((select w.ord from waiting___id__ w where w.consumer_id = __id__ and w.ord >= cut
                           order by w.ord limit 1), cut);
    end if;
    passed := array(select distinct p from unnest(passed) p where p < floor order by p);
end $$;
