-- How a fifo consumer's messages are claimed.
--
-- A message may go out when nobody else holds its key: no other lease, nothing given back, nothing that waits before it.
-- There is no bookkeeping of keys that could go wrong. A claim locks rows first (SKIP LOCKED), and then looks, in
-- a statement of its own, at all that it did not lock: whatever another session is about to do with those is not
-- committed, so they are seen where they were. Every move of a message between waiting, leases and delayed is one
-- transaction; so it is seen in one of them, or it is finished.
--
-- Each look into `delayed` has one index that serves it, so that statistics of an almost empty table do no harm: by key it says
-- `consumer_id + 0` (delayed_key), by time `visible_at > '-infinity'` (delayed_visible_at), by seq neither (the primary key).

-- claim_in_order(...) -> what claim() returns.
create or replace function claim_in_order(consumer consumers, hint hints, places smallint[], expired boolean, token bigint,
                                          moment timestamptz, until timestamptz, out taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    room constant int := cardinality(places);
    safe bigint;
begin
    taken := '{}';
    if expired then
        taken := claim_expired_in_order(consumer, hint, places, token, moment, until);
        token := token_drawn(token, taken);
    end if;
    if cardinality(taken) < room and exists (select from delayed d where d.consumer_id = consumer.id) then
        taken := taken || claim_delayed_in_order(consumer, hint, places[cardinality(taken) + 1:], cardinality(taken),
                                                 token, moment, until);
        token := token_drawn(token, taken);
    end if;
    plain := taken = '{}';
    if cardinality(taken) < room then
        -- Published messages may commit out of order: nothing behind one that can still appear.
        safe := case when jsonb_array_length(consumer.config -> 'topics') > 0 then max_safe_seq('messages_seq') end;
        taken := claim_waiting_in_order(consumer.id, hint, places, taken, token, moment, until, safe);
    end if;
    -- Asked when they are claimed: what was redriven in the meantime may be among them.
    plain := plain and taken = array(select t from unnest(taken) t order by t)
        and not exists (select from redriven r where r.consumer_id = consumer.id);
end $$;

-- claim_expired_in_order(...): deliveries whose timeout passed, of keys that free_expired() gives.
create or replace function claim_expired_in_order(consumer consumers, hint hints, places smallint[], token bigint,
                                                  moment timestamptz, until timestamptz) returns bigint[]
language plpgsql volatile as $$
declare
    wanted delivery[];
    tokens bigint[];
    parts int[];
    alive delivery[];
    taken bigint[] := '{}';
begin
    loop -- again where some died, and others have their room
        wanted := free_expired(consumer.id, hint, token, moment, null, null, cardinality(places));
        exit when wanted = '{}';
        select array_agg(l.token), array_agg(l.part) into tokens, parts
        from (select distinct w.token, w.part from unnest(wanted) w order by w.token, w.part) w
        cross join lateral (
            select l.token, l.part from leases l
            where l.consumer_id = consumer.id and l.token = w.token and l.part = w.part
              and l.not_visible_until <= moment
            for update skip locked) l;
        exit when tokens is null;
        -- A statement of its own: its snapshot is younger than the locks.
        wanted := free_expired(consumer.id, hint, token, moment, tokens, parts, cardinality(places));
        exit when wanted = '{}';
        perform remove_locked(consumer.id, wanted);
        alive := bury_last(consumer, wanted);
        token := coalesce(token, draw_token());
        taken := taken || insert_leases(consumer.id, alive, places, cardinality(taken), token, moment, until);
        places := places[cardinality(alive) + 1:];
        exit when cardinality(alive) = cardinality(wanted) or places = '{}';
    end loop;
    return taken;
end $$;

-- free_expired(consumer_id, hint, claimed, moment, tokens, parts, wanted) -> up to `wanted` deliveries whose timeout passed, in
-- order, of these leases (null: of all): those with nothing of their key before them elsewhere, and none in flight.
create or replace function free_expired(consumer_id int, hint hints, claimed bigint, moment timestamptz, tokens bigint[],
                                        parts int[], wanted int) returns delivery[]
language plpgsql volatile as $$
begin
    return (
        with every as materialized (
            select d, d.key, d.ord, d.tie, d.not_visible_until > moment as in_flight,
                   d.not_visible_until <= moment and (tokens is null or (d.token, d.part) in (
                       select t.token, t.part from unnest(tokens, parts) as t (token, part))) as mine
            from unnest(deliveries_of(free_expired.consumer_id, array(
                select l.token from live_leases(free_expired.consumer_id, hint) l where l.token is distinct from claimed))) d
        ), free as (
            select c.d, c.ord, c.tie from every c
            where c.mine
              and (c.key is null
                   or case when c.key in (select o.key from every o where not o.mine and o.key is not null) -- by hash
                      then not exists (select from every o where o.key = c.key and not o.mine
                                       and (o.in_flight or (o.ord, o.tie) < (c.ord, c.tie)))
                      else true end
                      and not exists (select from delayed e
                                      where e.consumer_id + 0 = free_expired.consumer_id and e.in_order and e.key = c.key
                                        and hashtextextended(e.key, e.consumer_id)
                                          = hashtextextended(c.key, free_expired.consumer_id)
                                        and (e.ord, e.tie) < (c.ord, c.tie)))
            order by c.ord, c.tie limit wanted)
        select coalesce(array_agg(f.d order by f.ord, f.tie), '{}') from free f);
end $$;

-- claim_delayed_in_order(...): messages given back whose time has come, of keys that free_delayed() gives.
create or replace function claim_delayed_in_order(consumer consumers, hint hints, places smallint[], offset_ int,
                                                  token bigint, moment timestamptz, until timestamptz) returns bigint[]
language plpgsql volatile as $$
declare
    wanted bigint[] := free_delayed(consumer.id, hint, token, moment, null, cardinality(places));
    due delivery[];
begin
    -- Lateral: a look-up each.
    wanted := array(select d.seq from unnest(wanted) as w (seq) cross join lateral (
                        select d.seq from delayed d
                        where d.consumer_id = consumer.id and d.seq = w.seq and d.visible_at <= moment
                        for update skip locked) d);
    if wanted <> '{}' then
        -- A statement of its own: its snapshot is younger than the locks.
        wanted := free_delayed(consumer.id, hint, token, moment, wanted, cardinality(places));
    end if;
    if wanted = '{}' then
        return '{}';
    end if;
    with gone as (
        delete from delayed d where d.consumer_id = consumer.id and d.seq = any (wanted) returning d.*)
    select array_agg(row(null, null, null, g.seq, g.key, g.barrier, g.deliver_count, g.history, g.last_delivered_at,
                         g.visible_at, g.inserted_at, g.ord, g.tie)::delivery order by g.ord, g.tie) into due from gone g;
    return insert_leases(consumer.id, due, places, offset_, coalesce(token, draw_token()), moment, until);
end $$;

-- free_delayed(consumer_id, hint, claimed, moment, seqs, wanted) -> up to `wanted` messages given back whose time has come, of
-- these (null: of all): those with nothing of their key before them elsewhere, and none in flight.
create or replace function free_delayed(consumer_id int, hint hints, claimed bigint, moment timestamptz, seqs bigint[],
                                        wanted int) returns bigint[]
language plpgsql volatile as $$
begin
    return (
        with held as materialized (
            select o.key, o.ord, o.tie, o.not_visible_until > moment as in_flight
            from unnest(deliveries_of(free_delayed.consumer_id, array(
                select l.token from live_leases(free_delayed.consumer_id, hint) l where l.token is distinct from claimed))) o
        )
        select coalesce(array_agg(f.seq), '{}') from (
            select d.seq from delayed d
            where d.consumer_id = free_delayed.consumer_id and d.visible_at > '-infinity' and d.visible_at <= moment
              and (seqs is null or d.seq in (select s from unnest(seqs) s))
              and (d.key is null
                   or case when d.key in (select h.key from held h where h.in_flight and h.key is not null) then false -- by hash
                      when d.key in (select h.key from held h where h.key is not null)
                      then not exists (select from held h where h.key = d.key and (h.ord, h.tie) < (d.ord, d.tie))
                      else true end
                      -- An earlier one that is due, too, goes with it if it comes to its turn before.
                      and not exists (select from delayed e
                                      where e.consumer_id + 0 = free_delayed.consumer_id and e.in_order and e.key = d.key
                                        and hashtextextended(e.key, e.consumer_id)
                                          = hashtextextended(d.key, free_delayed.consumer_id)
                                        and (e.ord, e.tie) < (d.ord, d.tie)
                                        and not (e.visible_at <= d.visible_at
                                                 and (seqs is null or e.seq in (select s from unnest(seqs) s)))))
            order by d.visible_at, d.ord, d.tie limit wanted) f);
end $$;

-- claim_in_order_template() -> the code that claims messages which are delivered for the first time.
-- A row that holds messages of other keys beside those that may not go out is cut up: the latter become runs, a key each,
-- which the next claims pass by without a look inside for as long as their key is held.
-- A claim that would overtake another one looks once more for the rest of its batch, at eight times as many messages, and is then
-- content with what it has. If it has nothing, it begins anew 2 ms later, when the other one has most likely committed. Only when
-- that has failed five times it looks further, at any number of messages: the other one stays in its transaction. Without
-- this rule a claim that met another at work would lock all that waits, and the next ones would find nothing.
create or replace function claim_in_order_template() returns text
language sql immutable as $template$
    select $code$
-- claim_in_order(...): as its template says.
create or replace function claim_in_order_<id>(hint hints, places smallint[], taken bigint[], claimed bigint,
                                               moment timestamptz, until timestamptz, safe bigint)
returns bigint[]
language plpgsql volatile as $$
declare
    leased boolean;
    given_back boolean;
    held text[] := '{}';
    barrier record;
    last_ord bigint := 0;
    last_tie bigint := 0;
    -- A cursor, so that no row is locked that is not needed.
    cur cursor for
        select w.ord, w.tie, w.seqs, w.keys, w.inserted_at from live_waiting_<id>(hint) l cross join lateral (
            select * from waiting_<id> w where w.consumer_id = <id> and w.ord = l.ord and w.tie = l.tie
            for update skip locked) w
        where (l.ord, l.tie) > (last_ord, last_tie) and not l.barrier
          and (barrier.ord is null or (l.ord, l.tie) < (barrier.ord, barrier.tie))
          and (safe is null or l.ord <= safe)
          and (l.not_before is null or l.not_before <= moment)
          and not (cardinality(l.keys) = 1 and l.keys[1] is not null and (
                       l.keys[1] in (select h from unnest(held) h)
                       or given_back and exists (select from delayed d where d.consumer_id + 0 = <id> and d.in_order
                                                 and d.key = l.keys[1] and hashtextextended(d.key, d.consumer_id)
                                                                         = hashtextextended(l.keys[1], <id>))));
    room int;
    look int := cardinality(places) - cardinality(taken); -- how many messages to look at; more and more if many are held
    ords bigint[];
    ties bigint[];
    sizes int[];    -- how many messages of each row are looked at here
    rests int[];    -- and how many it has beyond them
    runs boolean[];
    seqs_ bigint[]; -- those messages
    keys_ text[];
    since timestamptz;
    said record;    -- the numbers of those that may go out, and of those that may not for some time
    free int[];
    overtaking boolean := false; -- some may not, only because another claim has locked an earlier message of their key
    attempts constant int := 6;
begin
    for attempt in 1 .. attempts loop
        select exists (select from live_leases(<id>, hint)), exists (select from delayed d where d.consumer_id = <id>)
        into leased, given_back;
        if leased then
            held := array(select h.key from held_keys(<id>, hint) h where h.token is distinct from claimed);
        end if;
        -- Claims do not pass a barrier by, so it never stands below the floor. Without the consumer's id, which would let the
        -- planner look for it along the primary key.
        select w.ord, w.tie into barrier from waiting_<id> w
        where w.barrier and w.ord >= hint.waiting_floor order by w.ord, w.tie limit 1;
        loop
            room := cardinality(places) - cardinality(taken);
            exit when room = 0;
            ords := '{}'; ties := '{}'; sizes := '{}'; rests := '{}'; runs := '{}'; seqs_ := '{}'; keys_ := '{}';
            for r in cur loop
                ords := ords || r.ord;
                ties := ties || r.tie;
                runs := runs || (cardinality(r.keys) = 1);
                sizes := sizes || least(cardinality(r.seqs), look - cardinality(seqs_));
                rests := rests || greatest(0, cardinality(r.seqs) - look + cardinality(seqs_));
                keys_ := keys_ || case when cardinality(r.keys) > 1 then r.keys[:look - cardinality(seqs_)]
                                       else array_fill(r.keys[1], array[sizes[cardinality(sizes)]]) end;
                seqs_ := seqs_ || r.seqs[:look - cardinality(seqs_)];
                since := coalesce(since, r.inserted_at);
                last_ord := r.ord;
                last_tie := r.tie;
                exit when cardinality(seqs_) >= look;
            end loop;
            exit when seqs_ = '{}';
            claimed := coalesce(claimed, draw_token());
            select * into said from free_messages_<id>(hint, ords, ties, sizes, keys_, claimed);
            free := said.free;
            if cardinality(free) = cardinality(seqs_) and cardinality(free) <= room then
                taken := insert_claimed(<id>, claimed, places, taken, seqs_, keys_, moment, until, since);
                perform remove_front_<id>(ords, ties, rests);
            else
                if free <> '{}' then
                    taken := insert_claimed(<id>, claimed, places, taken, array(select seqs_[f] from unnest(free[:room]) f),
                                            array(select keys_[f] from unnest(free[:room]) f), moment, until, since);
                end if;
                exit when said.shut;
                perform cut_up_<id>(ords, ties, runs, sizes, free, said.held, room);
                overtaking := cardinality(free) + cardinality(said.held) < cardinality(seqs_);
                exit when overtaking and case when taken = '{}' then attempt < attempts else look > cardinality(places) end;
            end if;
            look := least(8 * look, 8192);
        end loop;
        exit when not overtaking or taken <> '{}';
        perform pg_sleep(0.002);
        overtaking := false;
        last_ord := 0;
        last_tie := 0;
        look := cardinality(places);
    end loop;
    if taken = '{}' and barrier.ord is not null then
        return claim_barrier_<id>(hint, barrier.ord, barrier.tie, places[1], claimed, moment, until);
    end if;
    return taken;
end $$;

-- free_messages(...) -> the numbers of those messages in these locked rows that may go out; of those whose key is held, for example
-- by a delivery, so that they may not go out for some time; shut: a barrier is in front of them. The others have an earlier message
-- of their key in front of them, in a row that another claim has locked: they can go out as soon as that one commits.
-- Called when the rows are locked: its snapshot is younger. Stable, so that all its statements look with that one snapshot: a
-- message that moves from one table to another meanwhile is seen in one of them. What is mostly empty is asked for first.
create or replace function free_messages_<id>(hint hints, ords bigint[], ties bigint[], sizes int[], keys_ text[],
                                              claimed bigint, out free int[], out held int[], out shut boolean)
language plpgsql stable as $$
declare
    last_ord constant bigint := ords[cardinality(ords)];
    last_tie constant bigint := ties[cardinality(ties)];
    leased boolean;
    given_back boolean;
    held_keys text[]; -- at first those of messages that are published for later
    ahead bigint[]; -- ord and tie of the first message in front of these, of each key that has one
    ahead_keys text[];
    ends int[] := '{}';
begin
    select exists (select from live_leases(<id>, hint)),
           exists (select from delayed d where d.consumer_id = <id>),
           exists (select from waiting_<id> w where w.barrier and w.ord >= hint.waiting_floor
                   and (w.ord, w.tie) < (last_ord, last_tie)),
           o.firsts, o.keys, coalesce(o.later, '{}')
    into leased, given_back, shut, ahead, ahead_keys, held_keys
    from (select array_agg(k.first) as firsts, array_agg(k.key) as keys, array_agg(k.key) filter (where k.later) as later
          from (select min(array[w.ord, w.tie]) as first, u.key, bool_or(w.not_before is not null) as later
                from live_waiting_<id>(hint) w cross join lateral unnest(w.keys) as u (key)
                where (w.ord, w.tie) < (last_ord, last_tie)
                  and case when true then u.key in (select k from unnest(keys_) k) end
                  and case when true then (w.ord, w.tie) not in (select m.ord, m.tie from unnest(ords, ties) as m (ord, tie)) end
                group by u.key) k) o;
    if leased then
        select shut or exists (select from live_leases(<id>, hint) l where l.barrier),
               held_keys || array(select h.key from held_keys(<id>, hint) h
                                  where h.token is distinct from claimed and h.key in (select k from unnest(keys_) k))
        into shut, held_keys;
    end if;
    if given_back then
        select shut or exists (select from delayed d where d.consumer_id = <id> and d.barrier),
               held_keys || array(select k from unnest(keys_) k
                                  where exists (select from delayed d
                                                where d.consumer_id + 0 = <id> and d.in_order and d.key = k
                                                  and hashtextextended(d.key, d.consumer_id) = hashtextextended(k, <id>)))
        into shut, held_keys;
    end if;
    held := '{}';
    if shut then
        free := '{}';
    elsif held_keys = '{}' and ahead is null then
        free := array(select generate_series(1, cardinality(keys_)));
    else
        for i in 1 .. cardinality(sizes) loop
            ends := ends || coalesce(ends[i - 1], 0) + sizes[i];
        end loop;
        -- By a window, which sorts: a join could go over all pairs.
        free := array(
            select u.n
            from (select m.*, min(m.ahead) over (partition by m.key) as first
                  from (select m.key, m.n, 1 + width_bucket(m.n - 1, ends) as place, null::bigint[] as ahead
                        from unnest(keys_) with ordinality as m (key, n)
                        union all
                        select ahead_keys[a], null, null, array[ahead[a][1], ahead[a][2]]
                        from generate_series(1, cardinality(ahead_keys)) a) m) u
            where u.n is not null and (u.key is null or (
                case when true then u.key not in (select h from unnest(held_keys) h) end
                and (u.first is null or u.first > array[ords[u.place], ties[u.place]])))
            order by u.n);
        held := array(select m.n from unnest(keys_) with ordinality as m (key, n)
                      where case when true then m.key in (select h from unnest(held_keys) h) end order by m.n);
    end if;
end $$;

-- remove_front(...): these locked rows are claimed, but for the rest of the last one.
create or replace function remove_front_<id>(ords bigint[], ties bigint[], rests int[]) returns void
language plpgsql volatile as $$
declare
    last constant int := cardinality(rests);
begin
    if rests[last] > 0 then
        update waiting_<id> w
        set seqs = w.seqs[cardinality(w.seqs) - rests[last] + 1:],
            keys = case when cardinality(w.keys) = 1 then w.keys else w.keys[cardinality(w.seqs) - rests[last] + 1:] end
        where w.consumer_id = <id> and w.ord = ords[last] and w.tie = ties[last];
    end if;
    delete from waiting_<id> w
    where w.ctid = any (array(
        select f.ctid from unnest(ords, ties, rests) as d (ord, tie, rest) cross join lateral (
            select w.ctid from waiting_<id> w
            where w.consumer_id = <id> and w.ord = d.ord and w.tie = d.tie and d.rest = 0 offset 0) f));
end $$;

-- cut_up(...): these locked rows, of which the first `room` of the free messages are claimed: what is held goes into runs. What
-- merely waits for the commit of another claim stays as it is. Else receivers that are a moment late would cut all rows into
-- single messages.
create or replace function cut_up_<id>(ords bigint[], ties bigint[], runs boolean[], sizes int[], free int[], held int[], room int)
returns void
language plpgsql volatile as $$
declare
    r record;
    row_free int[];
    row_held int[];
    row_taken int;  -- how many of these are claimed
    first int := 1;
begin
    for i in 1 .. cardinality(ords) loop
        row_free := array(select f - first + 1 from unnest(free) f where f between first and first + sizes[i] - 1 order by f);
        row_held := array(select h - first + 1 from unnest(held) h where h between first and first + sizes[i] - 1);
        row_taken := least(cardinality(row_free), room);
        if runs[i] then
            -- All of one key, so either none of those looked at is free, or all are.
            if row_taken > 0 then
                delete from waiting_<id> w where w.consumer_id = <id> and w.ord = ords[i] and w.tie = ties[i]
                    and cardinality(w.seqs) = row_taken;
                update waiting_<id> w set seqs = w.seqs[row_taken + 1:]
                where w.consumer_id = <id> and w.ord = ords[i] and w.tie = ties[i];
            end if;
        elsif row_taken > 0 or row_held <> '{}' then
            delete from waiting_<id> w where w.consumer_id = <id> and w.ord = ords[i] and w.tie = ties[i]
            returning w.seqs, w.keys, w.inserted_at into r;
            -- The pieces stand where it stood, so that a hint that has passed it by knows of them. First the runs: what
            -- follows may have later messages of their keys.
            insert into waiting_<id> (consumer_id, ord, tie, seqs, keys, inserted_at)
            select <id>, ords[i], ties[i] + row_number() over (order by not u.held, min(u.n)) - 1,
                   array_agg(u.seq order by u.n),
                   case when u.held then array[min(u.key)] else array_agg(u.key order by u.n) end, r.inserted_at
            from (select u.*, case when true then u.n in (select h from unnest(row_held) h) end as held
                  from unnest(r.seqs, r.keys) with ordinality as u (seq, key, n)
                  where case when true then u.n not in (select f from unnest(row_free[:row_taken]) f) end) u
            group by u.held, case when u.held then u.key end;
        end if;
        room := room - row_taken;
        first := first + sizes[i];
    end loop;
end $$;

-- claim_barrier(...) -> the barrier's seq, where nothing before it is unfinished.
create or replace function claim_barrier_<id>(hint hints, at bigint, at_tie bigint, place smallint, claimed bigint,
                                              moment timestamptz, until timestamptz) returns bigint[]
language plpgsql volatile as $$
declare
    b record;
begin
    select w.seqs, w.keys, w.inserted_at into b from waiting_<id> w
    where w.consumer_id = <id> and w.ord = at and w.tie = at_tie and w.barrier for update skip locked;
    if b.seqs is null then
        return '{}';
    end if;
    -- A statement of its own: its snapshot is younger than the lock.
    if exists (select from live_waiting_<id>(hint) w where (w.ord, w.tie) < (at, at_tie))
        or exists (select from delayed d where d.consumer_id = <id>)
        or deliveries_of(<id>, array(select l.token from live_leases(<id>, hint) l)) <> '{}'
    then
        return '{}';
    end if;
    delete from waiting_<id> w where w.consumer_id = <id> and w.ord = at and w.tie = at_tie;
    claimed := coalesce(claimed, draw_token());
    insert into leases (consumer_id, token, part, slot, seqs, keys, barrier, deliver_count, last_delivered_at,
                        not_visible_until, inserted_at)
    values (<id>, claimed, 1, place, b.seqs, b.keys, true, 1, moment, until, b.inserted_at);
    return b.seqs;
end $$
    $code$
$template$;
