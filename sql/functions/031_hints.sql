-- Where a claim begins to look. Without it every claim would wade through what others have finished and vacuum has not
-- removed: for as long as some old snapshot is held, that is everything since.

-- newest_hint(consumer_id) → the hint to go by. From the right end of the index.
create or replace function newest_hint(consumer_id int) returns hints
language plpgsql stable as $$
begin
    return (select h from hints h where h.consumer_id = newest_hint.consumer_id order by h.id desc limit 1);
end $$;

-- live_leases(consumer_id, hint) → the consumer's leases, in flight or expired. No SET clause, so that it is inlined; lateral
-- with offset 0, so that it is a look-up each, whatever the statistics say.
create or replace function live_leases(consumer_id int, hint hints) returns setof leases
language sql stable as $$
    select l.* from unnest(($2).tokens) as t (token) cross join lateral (
        select * from leases l where l.consumer_id = $1 and l.token = t.token offset 0) l
    union all
    select l.* from leases l where l.consumer_id = $1 and l.token >= ($2).token_floor
$$;

-- leases_of(consumer_id, tokens) → the rows of these claims, likewise.
create or replace function leases_of(consumer_id int, tokens bigint[]) returns setof leases
language sql stable as $$
    select l.* from (select distinct t as token from unnest($2) t) t cross join lateral (
        select * from leases l where l.consumer_id = $1 and l.token = t.token offset 0) l
$$;

-- renew_hint(consumer_id, hint): a new hint, where a claim has come far from where the old one begins.
create or replace function renew_hint(consumer_id int, hint hints) returns void
language plpgsql volatile as $$
declare
    safe_token bigint;
    safe_seq bigint;
    lowest bigint;
begin
    -- First what can still appear, then what is there: in this order, in statements of their own.
    safe_token := max_safe_seq('tokens_seq');
    safe_seq := max_safe_seq('messages_seq');
    execute format('select first_waiting_%s($1)', consumer_id) into lowest using hint.waiting_floor;
    with made as (
        insert into hints (consumer_id, waiting_floor, token_floor, tokens)
        select renew_hint.consumer_id, greatest(hint.waiting_floor, least(lowest, safe_seq)), safe_token + 1,
               coalesce(array_agg(distinct l.token), '{}')
        from live_leases(renew_hint.consumer_id, hint) l where l.token <= safe_token
        having greatest(hint.waiting_floor, least(lowest, safe_seq)) > hint.waiting_floor
            or safe_token >= hint.token_floor
        returning id)
    delete from hints h using made
    where h.ctid = (select o.ctid from hints o where o.consumer_id = renew_hint.consumer_id and o.id = hint.id
                    for update skip locked);
end $$;

-- forget_hints(): older ones than the newest, which two claims that renewed one hint at once have left.
create or replace function forget_hints() returns void
language sql as $$
    delete from hints h using consumers c
    where h.consumer_id = c.id
      and h.id < (select n.id from hints n where n.consumer_id = c.id order by n.id desc limit 1)
$$;

-- first_waiting_template() → the code that finds the first row that waits, whoever may have locked it.
create or replace function first_waiting_template() returns text
language sql immutable as $template$
    select $code$
-- first_waiting(floor) → the position of the first row that waits; null where none does.
create or replace function first_waiting_<id>(floor bigint) returns bigint
language plpgsql stable as $$
begin
    return (select w.ord from waiting_<id> w where w.consumer_id = <id> and w.ord >= floor order by w.ord, w.tie limit 1);
end $$
    $code$
$template$;
