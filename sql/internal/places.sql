-- max_in_flight: where a claim finds places, so that all claims together never have more, in whichever order they commit.
--
-- The limit is cut into up to 64 slots. A claim mostly has its slots to itself: it holds their locks to the end of its transaction,
-- and counts their leases after it has the locks. When it has taken its messages it tells, by further locks, how many places it
-- uses of a slot that it has not used up, because its leases are not committed. So a claim that finds too few free slots can share
-- those of others: it counts what is committed, and adds up what others tell. While such a claim is not committed, all claims go
-- one by one and look at what others tell.
--
-- The locks are advisory ones:
--   (leases, consumer * 64 + slot), exclusive: the slot is a claim's own.
--   (hints, consumer, slot, number), shared: this transaction uses so many places of the slot that are not committed.
--   leases << 32 | consumer * 2, shared: its holder shares slots. A claim that can lock it alone for a moment knows that nobody does.
--   leases << 32 | consumer * 2 + 1, exclusive, for the time of one claim: claims go one by one while somebody shares.

-- take_slots(consumer_id, max_in_flight, wanted, slots) -> `slots`, and more of max_in_flight that are ours until the
-- transaction ends: together enough for `wanted` if nothing were in flight, or all that are free.
-- Locks: an advisory transaction lock per slot, never waited for.
create or replace function take_slots(consumer_id int, max_in_flight int, wanted int, slots smallint[]) returns smallint[]
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    class constant int := 'leases'::regclass::oid::int;
    slot int := floor(random() * number);
begin
    for i in 1 .. number loop
        if slot <> all (slots) and pg_try_advisory_xact_lock(class, take_slots.consumer_id * 64 + slot) then
            slots := slots || slot::smallint;
        end if;
        exit when cardinality(slots) * (max_in_flight / number) >= wanted;
        slot := (slot + 1) % number;
    end loop;
    return slots;
end $$;

-- survey(consumer_id, hint, max_in_flight, wanted, slots, told, moment) -> for each place that is free in these slots, the slot, up to
-- `wanted`; whether there are leases whose timeout passed, or messages given back whose time has come.
-- told: by slot, what others use and have not committed; null where nobody shares and the slots are the claim's own.
-- Called when the slots' locks are held: its snapshot is younger.
create or replace function survey(consumer_id int, hint hints, max_in_flight int, wanted int, slots smallint[], told int[],
                                  moment timestamptz, out places smallint[], out expired boolean, out due boolean)
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    used int[] := coalesce(told, array_fill(0, array[number], array[0]));
    l record;
    free int;
begin
    for l in
        -- Modulo: the limit may have been lowered since.
        select v.slot % number as slot,
               case when v.not_visible_until > moment then cardinality(v.seqs) - (
                   select count(*) from settled s where s.consumer_id = v.consumer_id and s.token = v.token
                   and s.part = v.part)::int end as size
        from live_leases(survey.consumer_id, hint) v
        union all
        (select null, null from delayed d
         where d.consumer_id = survey.consumer_id and d.visible_at > '-infinity' and d.visible_at <= moment limit 1)
    loop
        if l.size is not null then
            used[l.slot] := used[l.slot] + l.size;
        elsif l.slot is not null then
            expired := true;
        else
            due := true;
        end if;
    end loop;
    places := '{}';
    for i in 1 .. cardinality(slots) loop
        free := max_in_flight / number + (slots[i] < max_in_flight % number)::int - used[slots[i]];
        places := places || array_fill(slots[i], array[greatest(0, least(free, wanted - cardinality(places)))]);
    end loop;
end $$;

-- sharing_lock(consumer_id) -> the lock of those that share. The next number is that under which they go one by one.
create or replace function sharing_lock(consumer_id int) returns bigint
language sql stable as $$
    select 'leases'::regclass::oid::bigint << 32 | (consumer_id::bigint * 2 & 4294967295)
$$;

-- somebody_shares(sharing) -> whether another transaction shares slots, asked again when the lock could not be had alone. It could
-- not be had because somebody shares, or because another claim asks at this moment. That one has the lock alone, so that it
-- cannot be shared now: then nobody shares. Asked twice, for one that had it alone and has just given it back.
create or replace function somebody_shares(sharing bigint) returns boolean
language plpgsql volatile as $$
begin
    return pg_try_advisory_lock_shared(sharing) and pg_advisory_unlock_shared(sharing)
        and not (pg_try_advisory_lock(sharing) and pg_advisory_unlock(sharing))
        and pg_try_advisory_lock_shared(sharing) and pg_advisory_unlock_shared(sharing);
end $$;

-- told_lock(consumer_id, slot, number) -> the second half of the lock that tells it. Inlined, for it has no SET clause, and short: each
-- transaction prepares its expressions anew.
create or replace function told_lock(consumer_id int, slot int, number int) returns int
language sql immutable as $$
    select (consumer_id << 20) | (slot << 14) | least(number, 16383)
$$;

-- tell_claim(consumer_id, places, slots): this transaction uses these places, beside those that it told of before, and no more of
-- these slots, which are its own. What it has used up of slots before is not told.
-- Locks: one, shared, per slot, to the end of the transaction.
create or replace function tell_claim(consumer_id int, places smallint[], slots smallint[]) returns void
language plpgsql volatile as $$
declare
    class constant int := 'hints'::regclass::oid::int;
    setting constant text := 'cdcbridge.claimed_' || consumer_id;
    told constant text := coalesce(current_setting(setting, true), '');
    full_ones constant int[] := case when told = '' then '{}' else array(
        select s from unnest(own_slots(consumer_id)) s
        where s <> all (slots) and s not in (select b::int >> 14 from unnest(string_to_array(told, ' ')) b)) end;
begin
    perform set_config(setting, coalesce(string_agg(told_lock(0, t.slot, t.number)::text, ' '), nullif(told, ''), '0'), true),
            count(pg_advisory_xact_lock_shared(class, told_lock(consumer_id, t.slot, t.number))::text)
    from (select u.slot, sum(u.number)::int as number
          from (select s::int, 0 from unnest(slots) s
                union all
                select p::int, count(*)::int from unnest(places) p group by p
                union all
                select b::int >> 14, b::int & 16383 from unnest(string_to_array(told, ' ')) b
                where b <> '') u (slot, number)
          where u.slot <> all (full_ones)
          group by u.slot) t;
end $$;

-- own_slots(consumer_id) -> the slots that this transaction has to itself.
create or replace function own_slots(consumer_id int) returns int[]
language sql volatile as $$
    select array(select (l.objid::bigint % 64)::int from pg_locks l
                 where l.locktype = 'advisory' and l.objsubid = 2 and l.granted and l.pid = pg_backend_pid()
                   and l.classid = 'leases'::regclass and l.mode = 'ExclusiveLock' and l.objid::bigint / 64 = $1)
$$;

-- claims_in_progress(consumer_id) -> of other transactions that are not committed: how many places of each slot they use; null
-- where one has the slot to itself, and uses all of it or has not told yet.
create or replace function claims_in_progress(consumer_id int) returns table (slot int, used int)
language sql volatile as $$
    with held as materialized (
        select l.virtualtransaction as holder, l.classid = 'hints'::regclass as tells,
               (case when l.classid = 'hints'::regclass then l.objid::bigint >> 14 else l.objid::bigint end % 64)::int as slot,
               l.objid::bigint & 16383 as used
        from pg_locks l
        where l.locktype = 'advisory' and l.objsubid = 2 and l.granted and l.pid is distinct from pg_backend_pid()
          and l.database = (select oid from pg_database where datname = current_database())
          and (l.classid = 'leases'::regclass and l.mode = 'ExclusiveLock' and l.objid::bigint / 64 = $1
               or l.classid = 'hints'::regclass and l.mode = 'ShareLock' and l.objid::bigint >> 20 = $1 % 4096)
    )
    -- A transaction that claims several times tells sums: the greatest is the last.
    select t.slot, sum(t.used)::int
    from (select h.holder, h.slot, max(h.used) as used from held h where h.tells group by 1, 2) t
    group by t.slot
    union all
    select h.slot, null from held h
    where not h.tells and not exists (select from held t where t.holder = h.holder and t.tells and t.slot = h.slot)
$$;

-- claim_shared(consumer, hint, wanted, slots, moment, until) -> what claim() returns, of places that nobody uses: of the claim's own
-- slots, and where they have too few, of all. A claim that needs its own alone does not share, so that others need not either:
-- otherwise one claim that shares would make all share that come while it does, and those the next ones, without an end.
-- slots: those that are this claim's own; none where its transaction has claimed before.
-- Locks: see above. These claims go one by one; one waits 0.2 s for its turn, and then takes nothing.
create or replace function claim_shared(consumer consumers, hint hints, wanted int, slots smallint[], moment timestamptz,
                                        until timestamptz, out taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    max_in_flight constant int := consumer.config ->> 'max_in_flight';
    number constant int := least(64, max_in_flight);
    sharing constant bigint := sharing_lock(consumer.id);
    turn boolean := false; -- our turn, and we share: the two locks that are to be given back
    shares boolean := false;
    within smallint[] := slots;
    used int[];
    places smallint[];
    look record;
    k record;
begin
    taken := '{}';
    plain := true;
    for i in 1 .. 100 loop
        turn := pg_try_advisory_lock(sharing + 1);
        exit when turn;
        perform pg_sleep(0.002);
    end loop;
    if not turn then
        perform tell_claim(consumer.id, '{}', slots);
        return;
    end if;
    for attempt in 1 .. 2 loop
        if attempt = 2 or slots = '{}' then
            perform pg_advisory_lock_shared(sharing);
            shares := true;
            within := slots || array(select n::smallint from generate_series(0, number - 1) n where n <> all (slots));
        end if;
        used := array_fill(0, array[number], array[0]);
        for k in select * from claims_in_progress(consumer.id) loop
            used[k.slot % number] := used[k.slot % number] + coalesce(k.used, 1000000);
        end loop;
        -- A statement of its own, younger: what was committed meanwhile is counted twice, never left out.
        look := survey(consumer.id, hint, max_in_flight, wanted, within, used, moment);
        exit when shares or cardinality(look.places) >= wanted;
    end loop;
    select c.taken, c.plain into taken, plain
    from claim(consumer, wanted, moment, until, look.places, look.expired, look.due) c;
    places := look.places[:cardinality(taken)];
    perform tell_claim(consumer.id, places, slots);
    if shares and not places::int[] <@ own_slots(consumer.id) then
        perform pg_advisory_xact_lock_shared(sharing);
    end if;
    perform case when shares then pg_advisory_unlock_shared(sharing) end, pg_advisory_unlock(sharing + 1);
exception
    when others or query_canceled then
        perform case when shares then pg_advisory_unlock_shared(sharing) end, case when turn then pg_advisory_unlock(sharing + 1) end;
        raise;
end $$;
