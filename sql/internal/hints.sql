-- Where a claim begins to look. Without it every claim would wade through what others have finished and vacuum has not
-- removed: for as long as some old snapshot is held, that is everything since.

-- newest_hint(consumer_id) -> the hint to go by. From the right end of the index.
create or replace function newest_hint(consumer_id int) returns hints
language plpgsql stable as $$
begin
    return (select h from hints h where h.consumer_id = newest_hint.consumer_id order by h.id desc limit 1);
end $$;

-- live_leases(consumer_id, hint) -> the consumer's leases, in flight or expired. No SET clause, so that it is inlined; lateral
-- with offset 0, so that it is a look-up each, whatever the statistics say.
create or replace function live_leases(consumer_id int, hint hints) returns setof leases
language sql stable as $$
    select l.* from unnest(($2).tokens) as t (token) cross join lateral (
        select * from leases l where l.consumer_id = $1 and l.token = t.token offset 0) l
    union all
    select l.* from leases l where l.consumer_id = $1 and l.token >= ($2).token_floor
$$;

-- leases_of(consumer_id, tokens) -> the rows of these claims, likewise.
create or replace function leases_of(consumer_id int, tokens bigint[]) returns setof leases
language sql stable as $$
    select l.* from (select distinct t as token from unnest($2) t) t cross join lateral (
        select * from leases l where l.consumer_id = $1 and l.token = t.token offset 0) l
$$;

-- held_keys(consumer_id, hint) -> the claims and the keys that they hold: what is settled holds its key no longer, although its row
-- of leases is there for the others. Inlined, as live_leases() is. One look into settled for a row that has nothing there.
create or replace function held_keys(consumer_id int, hint hints) returns table (token bigint, key text)
language sql stable as $$
    select l.token, u.key
    from (select v.token, v.part, v.seqs, v.keys, exists (
              select from settled s where s.consumer_id = $1 and s.token = v.token and s.part = v.part) as partly
          from live_leases($1, $2) v offset 0) l
    cross join lateral unnest(l.seqs, l.keys) as u (seq, key)
    where u.key is not null
      -- By look-ups: an array of 16,000 would be searched for each of 32,000.
      and (not l.partly or not exists (select from settled s where s.consumer_id = $1 and s.token = l.token
                                       and s.part = l.part and s.seq = u.seq))
$$;

-- renew_hint(consumer_id, hint, front): a new hint, where a claim has come far from where the old one begins: to front.
create or replace function renew_hint(consumer_id int, hint hints, front bigint) returns void
language plpgsql volatile as $$
declare
    safe_token bigint;
    safe_seq bigint;
    passed bigint[];
    floor bigint;
begin
    -- First what can still appear, then what is there: in this order, in statements of their own.
    safe_token := max_safe_seq('tokens_seq');
    safe_seq := max_safe_seq('messages_seq');
    execute format('select w.passed, w.floor from find_floor_%s($1, $2) w', consumer_id) into passed, floor
    using hint, least(front - 512, safe_seq);
    with made as (
        insert into hints (consumer_id, waiting_floor, passed, token_floor, tokens)
        select renew_hint.consumer_id, least(floor, safe_seq), passed, safe_token + 1, coalesce(array_agg(distinct l.token), '{}')
        from live_leases(renew_hint.consumer_id, hint) l where l.token <= safe_token
        having least(floor, safe_seq) > hint.waiting_floor or safe_token >= hint.token_floor
        returning id)
    delete from hints h using made
    where h.ctid = (select o.ctid from hints o where o.consumer_id = renew_hint.consumer_id and o.id = hint.id
                    for update skip locked);
end $$;

-- forget_hints(): older ones than the newest, which two claims that renewed one hint at once have left.
-- Locks: these, by SKIP LOCKED: a receiver that stays in its transaction may have replaced one of them.
create or replace function forget_hints() returns void
language sql as $$
    delete from hints h where h.ctid = any (array(
        select o.ctid from consumers c join hints o on o.consumer_id = c.id
        where o.id < (select n.id from hints n where n.consumer_id = c.id order by n.id desc limit 1)
        for update of o skip locked))
$$;
