-- claim_in_order___id__(hint, capacity, taken, own_claim, moment, until, safe) -> `taken`, followed
-- by the seqs of messages of a fifo consumer that are delivered for the first time.
--
-- If no other message can be taken, the function tries to take the first barrier. No message after
-- `safe` is taken, unless `safe` is null.
--
-- Messages of held keys may share a row with other messages. Such a row is cut up: the messages of
-- each held key become a run, which is a row of one key. While the key is held, later claims pass
-- the run by without reading its messages.
--
-- Some messages cannot be claimed only because another claim in progress has locked earlier
-- messages of their keys. A claim that meets such messages does the following:
--   - If it has taken messages, it looks for the rest once more, at eight times as many messages.
--     Then it returns the messages that it has.
--   - If it has taken none, it starts again 2 ms later, when the other claim has most likely
--     committed. After five such attempts it looks further, at any number of messages, because the
--     other claim stays in its transaction.
-- Without this rule, a claim that meets another claim in progress would lock all waiting messages,
-- and the next claims would find none.
-- Locks: the rows that it reads, by SKIP LOCKED.
create or replace function claim_in_order___id__(hint hints, capacity smallint[], taken bigint[],
                                                 own_claim bigint, moment timestamptz,
                                                 until timestamptz, safe bigint)
returns bigint[]
language plpgsql volatile as $$
declare
    leased boolean;
    given_back boolean;
    held text[] := '{}';
    barrier record;
    last_ord bigint := 0;
    last_tie bigint := 0;
    -- A cursor locks no more rows than the claim needs.
    cur cursor for
        select w.ord, w.tie, w.seqs, w.keys, w.inserted_at
        from live_waiting___id__(hint) l cross join lateral (
            select * from waiting___id__ w
            where w.consumer_id = __id__ and w.ord = l.ord and w.tie = l.tie
            for update skip locked) w
        where (l.ord, l.tie) > (last_ord, last_tie) and not l.barrier
          and (barrier.ord is null or (l.ord, l.tie) < (barrier.ord, barrier.tie))
          and (safe is null or l.ord <= safe)
          and (l.not_before is null or l.not_before <= moment)
          and not (cardinality(l.keys) = 1 and l.keys[1] is not null and (
                       l.keys[1] in (select h from unnest(held) h)
                       or given_back and exists (
                           select from delayed d
                           where d.consumer_id + 0 = __id__ and d.in_order and d.key = l.keys[1]
                             and hashtextextended(d.key, d.consumer_id)
                               = hashtextextended(l.keys[1], __id__))));
    room int;
    -- The number of messages to look at. It grows if many of them are held.
    look int := cardinality(capacity) - cardinality(taken);
    front front_row[]; -- the rows that the claim has locked
    size int;
    seqs_ bigint[]; -- the messages to look at
    keys_ text[];
    since timestamptz;
    said record;    -- the result of free_messages
    free int[];
    -- Some messages wait only for another claim that has locked an earlier message of their key.
    overtaking boolean := false;
    attempts constant int := 6;
begin
    for attempt in 1 .. attempts loop
        select exists (select from live_leases(__id__, hint)),
               exists (select from delayed d where d.consumer_id = __id__)
        into leased, given_back;
        if leased then
            held := array(select h.key from held_keys(__id__, hint) h
                          where h.claim_id is distinct from own_claim);
        end if;
        -- Claims do not pass a barrier by, so it is never below the floor. The condition omits the
        -- consumer's id, because with it the planner might search along the primary key.
        select w.ord, w.tie into barrier from waiting___id__ w
        where w.barrier and w.ord >= hint.waiting_floor order by w.ord, w.tie limit 1;
        loop
            room := cardinality(capacity) - cardinality(taken);
            exit when room = 0;
            front := '{}'; seqs_ := '{}'; keys_ := '{}';
            for r in cur loop
                size := least(cardinality(r.seqs), look - cardinality(seqs_));
                front := front || row(r.ord, r.tie, cardinality(r.keys) = 1, size,
                                      cardinality(r.seqs) - size)::front_row;
                keys_ := keys_ || case when cardinality(r.keys) > 1 then r.keys[:size]
                                       else array_fill(r.keys[1], array[size]) end;
                seqs_ := seqs_ || r.seqs[:size];
                since := coalesce(since, r.inserted_at);
                last_ord := r.ord;
                last_tie := r.tie;
                exit when cardinality(seqs_) >= look;
            end loop;
            exit when seqs_ = '{}';
            own_claim := coalesce(own_claim, draw_claim_id());
            select * into said from free_messages___id__(hint, front, keys_, own_claim);
            free := said.free;
            if cardinality(free) = cardinality(seqs_) and cardinality(free) <= room then
                taken := insert_claimed(__id__, own_claim, capacity, taken, seqs_, keys_, moment,
                                        until,
                                        since);
                perform remove_front___id__(front);
            else
                if free <> '{}' then
                    taken := insert_claimed(__id__, own_claim, capacity, taken,
                                            array(select seqs_[f] from unnest(free[:room]) f),
                                            array(select keys_[f] from unnest(free[:room]) f),
                                            moment, until, since);
                end if;
                exit when said.shut;
                perform cut_up___id__(front, free, said.held, room);
                overtaking := cardinality(free) + cardinality(said.held) < cardinality(seqs_);
                exit when overtaking and case when taken = '{}' then attempt < attempts
                                              else look > cardinality(capacity) end;
            end if;
            look := least(8 * look, 8192);
        end loop;
        exit when not overtaking or taken <> '{}' or attempt = attempts;
        perform pg_sleep(0.002);
        overtaking := false;
        last_ord := 0;
        last_tie := 0;
        look := cardinality(capacity);
    end loop;
    if taken = '{}' and barrier.ord is not null then
        return claim_barrier___id__(hint, barrier.ord, barrier.tie, capacity[1], own_claim, moment,
                                    until);
    end if;
    return taken;
end $$;

-- free_messages___id__(hint, front, keys_, own_claim): Decide which messages in these locked rows
-- may be delivered.
--
-- The caller holds the locks of the rows, so the snapshot of this function is newer than the locks.
-- The function is stable, so that all its statements use that one snapshot. A message that moves
-- from one table to another in the meantime is seen in one of them. Tables that are usually empty
-- are checked first.
-- Returns:
--   free  the numbers of the messages that may be delivered
--   held  the numbers of the messages that may not be delivered for some time, because their key is
--         held, for example by a delivery, or because they follow a message published for later
--   shut  true if a barrier is before these messages
-- All other messages follow an earlier message of their key in a row that another claim has locked.
-- They may be delivered as soon as that claim commits.
create or replace function free_messages___id__(hint hints, front front_row[], keys_ text[],
                                                own_claim bigint, out free int[], out held int[],
                                                out shut boolean)
language plpgsql stable as $$
declare
    last constant front_row := front[cardinality(front)];
    leased boolean;
    given_back boolean;
    held_keys text[] := '{}';
    later_keys text[]; -- keys with a message before these that is published for later
    ahead key_place[]; -- the first message before these, for each key that has one
    locked front_row;
    ends int[] := '{}'; -- for each row the number of its last message,
    places bigint[] := '{}'; -- and its ord and its tie
begin
    select exists (select from live_leases(__id__, hint)),
           exists (select from delayed d where d.consumer_id = __id__),
           exists (select from waiting___id__ w where w.barrier and w.ord >= hint.waiting_floor
                   and (w.ord, w.tie) < (last.ord, last.tie)),
           o.firsts, coalesce(o.later, '{}')
    into leased, given_back, shut, ahead, later_keys
    from (select array_agg(row(k.key, k.first[1], k.first[2])::key_place) as firsts,
                 array_agg(k.key) filter (where k.later) as later
          from (select min(array[w.ord, w.tie]) as first, u.key,
                       bool_or(w.not_before is not null) as later
                from live_waiting___id__(hint) w cross join lateral unnest(w.keys) as u (key)
                where (w.ord, w.tie) < (last.ord, last.tie)
                  and case when true then u.key in (select k from unnest(keys_) k) end
                  and case when true then (w.ord, w.tie) not in (
                      select m.ord, m.tie from unnest(front) m) end
                group by u.key) k) o;
    if leased then
        select shut or exists (select from live_leases(__id__, hint) l where l.barrier),
               held_keys || array(select h.key from held_keys(__id__, hint) h
                                  where h.claim_id is distinct from own_claim
                                    and h.key in (select k from unnest(keys_) k))
        into shut, held_keys;
    end if;
    if given_back then
        select shut or exists (select from delayed d where d.consumer_id = __id__ and d.barrier),
               held_keys || array(select k from unnest(keys_) k
                                  where exists (select from delayed d
                                                where d.consumer_id + 0 = __id__ and d.in_order
                                                  and d.key = k
                                                  and hashtextextended(d.key, d.consumer_id)
                                                    = hashtextextended(k, __id__)))
        into shut, held_keys;
    end if;
    held := '{}';
    if shut then
        free := '{}';
    elsif held_keys = '{}' and ahead is null then
        free := array(select generate_series(1, cardinality(keys_)));
    else
        foreach locked in array front loop
            ends := ends || coalesce(ends[cardinality(ends)], 0) + locked.size;
            places := places || array[array[locked.ord, locked.tie]];
        end loop;
        -- A window function sorts. A join could compare all pairs.
        free := array(
            select u.n
            from (select m.*, min(m.ahead) over (partition by m.key) as first
                  from (select m.key, m.n, 1 + width_bucket(m.n - 1, ends) as row,
                               null::bigint[] as ahead
                        from unnest(keys_) with ordinality as m (key, n)
                        union all
                        select a.key, null, null, array[a.ord, a.tie] from unnest(ahead) a) m) u
            where u.n is not null and (u.key is null or (
                case when true then u.key not in (select h from unnest(held_keys) h) end
                and (u.first is null or u.first > array[places[u.row][1], places[u.row][2]])))
            order by u.n);
        held := array(select m.n from unnest(keys_) with ordinality as m (key, n)
                      where case when true then m.key in (
                                select h from unnest(held_keys || later_keys) h) end
                        and case when true then m.n not in (select f from unnest(free) f) end
                      order by m.n);
    end if;
end $$;

-- remove_front___id__(front): Delete these locked rows, whose messages are claimed.
--
-- Only the last row may have a rest, which remains.
create or replace function remove_front___id__(front front_row[]) returns void
language plpgsql volatile as $$
declare
    last constant front_row := front[cardinality(front)];
begin
    if last.rest > 0 then
        update waiting___id__ w
        set seqs = w.seqs[cardinality(w.seqs) - last.rest + 1:],
            keys = case when cardinality(w.keys) = 1 then w.keys
                        else w.keys[cardinality(w.seqs) - last.rest + 1:] end
        where w.consumer_id = __id__ and w.ord = last.ord and w.tie = last.tie;
    end if;
    delete from waiting___id__ w
    where w.ctid = any (array(
        select f.ctid from unnest(front) d cross join lateral (
            select w.ctid from waiting___id__ w
            where w.consumer_id = __id__ and w.ord = d.ord and w.tie = d.tie and d.rest = 0
            offset 0) f));
end $$;

-- cut_up___id__(front, free, held, room): Take the claimed messages out of these locked rows, and
-- turn the messages of held keys into runs.
--
-- The claimed messages are the first `room` of the free ones. Messages that only wait until another
-- claim commits remain as they are. Otherwise receivers that are a moment late would cut all rows
-- into single messages.
create or replace function cut_up___id__(front front_row[], free int[], held int[], room int)
returns void
language plpgsql volatile as $$
declare
    locked front_row;
    r record;
    row_free int[];
    row_held int[];
    row_taken int;  -- how many of the free messages are claimed
    first int := 1;
begin
    foreach locked in array front loop
        row_free := array(select n - first + 1 from unnest(free) n
                          where n between first and first + locked.size - 1 order by n);
        row_held := array(select n - first + 1 from unnest(held) n
                          where n between first and first + locked.size - 1);
        row_taken := least(cardinality(row_free), room);
        if locked.run then
            -- A run has one key, so of the messages to look at either all are free or none is.
            if row_taken > 0 then
                delete from waiting___id__ w
                where w.consumer_id = __id__ and w.ord = locked.ord and w.tie = locked.tie
                  and cardinality(w.seqs) = row_taken;
                update waiting___id__ w set seqs = w.seqs[row_taken + 1:]
                where w.consumer_id = __id__ and w.ord = locked.ord and w.tie = locked.tie;
            end if;
        elsif row_taken > 0 or row_held <> '{}' then
            delete from waiting___id__ w
            where w.consumer_id = __id__ and w.ord = locked.ord and w.tie = locked.tie
            returning w.seqs, w.keys, w.inserted_at into r;
            -- The pieces keep the ord of the row, so that a hint that names the row covers them as
            -- well. The runs are first, because the rest may have later messages of their keys.
            insert into waiting___id__ (consumer_id, ord, tie, seqs, keys, inserted_at)
            select __id__, locked.ord,
                   locked.tie + row_number() over (order by not u.held, min(u.n)) - 1,
                   array_agg(u.seq order by u.n),
                   case when u.held then array[min(u.key)] else array_agg(u.key order by u.n) end,
                   r.inserted_at
            from (select u.*,
                         case when true then u.n in (select h from unnest(row_held) h) end as held
                  from unnest(r.seqs, r.keys) with ordinality as u (seq, key, n)
                  where case when true then u.n not in (
                            select t from unnest(row_free[:row_taken]) t) end) u
            group by u.held, case when u.held then u.key end;
        end if;
        room := room - row_taken;
        first := first + locked.size;
    end loop;
end $$;

-- claim_barrier___id__(hint, at, at_tie, shard, own_claim, moment, until) -> the seq of the barrier
-- at (at, at_tie), if all messages before it are finished. Otherwise the result is empty.
--
-- Locks: the row of the barrier, by SKIP LOCKED.
create or replace function claim_barrier___id__(hint hints, at bigint, at_tie bigint,
                                                shard smallint, own_claim bigint,
                                                moment timestamptz, until timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    b record;
begin
    select w.seqs, w.keys, w.inserted_at into b from waiting___id__ w
    where w.consumer_id = __id__ and w.ord = at and w.tie = at_tie and w.barrier
    for update skip locked;
    if b.seqs is null then
        return '{}';
    end if;
    -- A statement of its own, so that its snapshot is newer than the lock.
    if exists (select from live_waiting___id__(hint) w where (w.ord, w.tie) < (at, at_tie))
        or exists (select from delayed d where d.consumer_id = __id__)
        or deliveries_of(__id__, array(select l.claim_id from live_leases(__id__, hint) l)) <> '{}'
    then
        return '{}';
    end if;
    delete from waiting___id__ w where w.consumer_id = __id__ and w.ord = at and w.tie = at_tie;
    own_claim := coalesce(own_claim, draw_claim_id());
    insert into leases (consumer_id, claim_id, part, shard, seqs, keys, barrier, deliver_count,
                        last_delivered_at, not_visible_until, inserted_at)
    values (__id__, own_claim, 1, shard, b.seqs, b.keys, true, 1, moment, until, b.inserted_at);
    return b.seqs;
end $$;
