-- max_in_flight: the places that a claim may fill. All claims of a consumer together never exceed
-- the limit, in whichever order they commit.
--
-- A place is room for one message in flight. The limit is divided into up to 64 slots. Usually a
-- claim does not share its slots: it holds their locks to the end of its transaction, and it counts
-- their leases after it has the locks.
--
-- Other transactions cannot see the leases of a claim before it commits. Therefore a claim that has
-- taken its messages reports, by further locks, how many places it uses of each slot that it has
-- not filled. A claim that finds too few free slots can then share the slots of other claims: it
-- counts the committed leases and adds the reported numbers. While such a claim is not committed,
-- all claims of the consumer run one at a time and add the reported numbers.
--
-- All of these are advisory locks:
--   (leases, consumer * 64 + slot), exclusive: no other claim uses the slot.
--   (hints, consumer, slot, number), shared: this transaction uses `number` places of the slot with
--     leases that are not committed.
--   leases << 32 | consumer * 2, shared: the holder shares slots. If a claim can take this lock
--     exclusively for a moment, no other claim shares slots.
--   leases << 32 | consumer * 2 + 1, exclusive, for the duration of one claim: claims run one at a
--     time while a claim shares slots.

-- take_slots(consumer_id, max_in_flight, wanted, slots) -> `slots`, and further slots that belong
-- to this transaction until it ends.
--
-- Together they have room for `wanted` messages if nothing is in flight. If too few slots are free,
-- all free ones are returned.
-- Locks: an advisory transaction lock for each slot. The function never waits for one.
create or replace function take_slots(consumer_id int, max_in_flight int, wanted int,
                                      slots smallint[])
returns smallint[]
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    class constant int := 'leases'::regclass::oid::int;
    slot int := floor(random() * number);
begin
    for i in 1 .. number loop
        if slot <> all (slots)
            and pg_try_advisory_xact_lock(class, take_slots.consumer_id * 64 + slot) then
            slots := slots || slot::smallint;
        end if;
        exit when cardinality(slots) * (max_in_flight / number) >= wanted;
        slot := (slot + 1) % number;
    end loop;
    return slots;
end $$;

-- survey(consumer_id, hint, max_in_flight, wanted, slots, told, moment): Find free places in these
-- slots.
--
-- The caller holds the locks of the slots, so the snapshot of this function is newer than the
-- locks.
-- Parameters:
--   told  for each slot, the number of places that other claims use and have not committed (null if
--         no claim shares slots and `slots` belong to this claim)
-- Returns:
--   places   for each free place the number of its slot, up to `wanted` elements
--   expired  true if there are leases whose visibility timeout has passed, otherwise null
--   due      true if there are messages in `delayed` that are due, otherwise null
create or replace function survey(consumer_id int, hint hints, max_in_flight int, wanted int,
                                  slots smallint[], told int[], moment timestamptz,
                                  out places smallint[], out expired boolean, out due boolean)
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    used int[] := coalesce(told, array_fill(0, array[number], array[0]));
    l record;
    free int;
begin
    for l in
        -- Modulo, because the limit may have been lowered since the lease was made.
        select v.slot % number as slot,
               case when v.not_visible_until > moment then cardinality(v.seqs) - (
                   select count(*) from settled s
                   where s.consumer_id = v.consumer_id and s.token = v.token
                     and s.part = v.part)::int end as size
        from live_leases(survey.consumer_id, hint) v
        union all
        (select null, null from delayed d
         where d.consumer_id = survey.consumer_id and d.visible_at > '-infinity'
           and d.visible_at <= moment limit 1)
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
        places := places || array_fill(
            slots[i], array[greatest(0, least(free, wanted - cardinality(places)))]);
    end loop;
end $$;

-- sharing_lock(consumer_id) -> the key of the advisory lock of claims that share slots.
--
-- The next number is the key of the lock under which claims run one at a time.
create or replace function sharing_lock(consumer_id int) returns bigint
language sql stable as $$
    select 'leases'::regclass::oid::bigint << 32 | (consumer_id::bigint * 2 & 4294967295)
$$;

-- somebody_shares(sharing) -> whether another transaction shares slots.
--
-- claim() calls this function after it could not take the lock exclusively. Either another
-- transaction shares slots, or another claim held the lock exclusively at that moment, to make the
-- same check. In the second case the lock cannot be taken in shared mode, so no transaction shares
-- slots. The shared mode is tried twice, because a claim that held the lock exclusively may just
-- have released it.
create or replace function somebody_shares(sharing bigint) returns boolean
language plpgsql volatile as $$
begin
    return pg_try_advisory_lock_shared(sharing) and pg_advisory_unlock_shared(sharing)
        and not (pg_try_advisory_lock(sharing) and pg_advisory_unlock(sharing))
        and pg_try_advisory_lock_shared(sharing) and pg_advisory_unlock_shared(sharing);
end $$;

-- told_lock(consumer_id, slot, number) -> the second half of the key of the lock that reports that
-- `number` places of the slot are used.
--
-- The function has no SET clause, so PostgreSQL inlines it. It is short, because each transaction
-- prepares its expressions anew.
create or replace function told_lock(consumer_id int, slot int, number int) returns int
language sql immutable as $$
    select (consumer_id << 20) | (slot << 14) | least(number, 16383)
$$;

-- tell_claim(consumer_id, places, slots): Report to other claims how many places this transaction
-- uses.
--
-- It uses `places`, in addition to the places that it reported before. `slots` belong to this
-- transaction alone, and it uses no other places of them. A slot that it filled before is not
-- reported.
-- Locks: a shared lock for each reported slot, to the end of the transaction.
create or replace function tell_claim(consumer_id int, places smallint[], slots smallint[])
returns void
language plpgsql volatile as $$
declare
    class constant int := 'hints'::regclass::oid::int;
    setting constant text := 'cdcbridge.claimed_' || consumer_id;
    told constant text := coalesce(current_setting(setting, true), '');
    full_ones constant int[] := case when told = '' then '{}' else array(
        select s from unnest(own_slots(consumer_id)) s
        where s <> all (slots)
          and s not in (select b::int >> 14 from unnest(string_to_array(told, ' ')) b)) end;
begin
    perform set_config(setting, coalesce(string_agg(told_lock(0, t.slot, t.number)::text, ' '),
                                         nullif(told, ''), '0'), true),
            count(pg_advisory_xact_lock_shared(
                class, told_lock(consumer_id, t.slot, t.number))::text)
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

-- own_slots(consumer_id) -> the slots that belong to this transaction alone.
create or replace function own_slots(consumer_id int) returns int[]
language sql volatile as $$
    select array(select (l.objid::bigint % 64)::int from pg_locks l
                 where l.locktype = 'advisory' and l.objsubid = 2 and l.granted
                   and l.pid = pg_backend_pid() and l.classid = 'leases'::regclass
                   and l.mode = 'ExclusiveLock' and l.objid::bigint / 64 = $1)
$$;

-- claims_in_progress(consumer_id) -> the slots that other transactions use and have not committed.
--
-- used is the number of places that a transaction has reported. It is null if a transaction has the
-- slot to itself and either fills it or has not reported yet.
create or replace function claims_in_progress(consumer_id int) returns table (slot int, used int)
language sql volatile as $$
    with held as materialized (
        select l.virtualtransaction as holder, l.classid = 'hints'::regclass as tells,
               (case when l.classid = 'hints'::regclass then l.objid::bigint >> 14
                     else l.objid::bigint end % 64)::int as slot,
               l.objid::bigint & 16383 as used
        from pg_locks l
        where l.locktype = 'advisory' and l.objsubid = 2 and l.granted
          and l.pid is distinct from pg_backend_pid()
          and l.database = (select oid from pg_database where datname = current_database())
          and (l.classid = 'leases'::regclass and l.mode = 'ExclusiveLock'
               and l.objid::bigint / 64 = $1
               or l.classid = 'hints'::regclass and l.mode = 'ShareLock'
               and l.objid::bigint >> 20 = $1 % 4096)
    )
    -- A transaction that claims several times reports sums, so the greatest is the latest.
    select t.slot, sum(t.used)::int
    from (select h.holder, h.slot, max(h.used) as used from held h where h.tells group by 1, 2) t
    group by t.slot
    union all
    select h.slot, null from held h
    where not h.tells and not exists (select from held t
                                      where t.holder = h.holder and t.tells and t.slot = h.slot)
$$;

-- claim_shared(consumer, hint, wanted, slots, moment, until): Do a claim that takes the uncommitted
-- claims of other transactions into account.
--
-- The claim first uses its own slots. It shares the slots of other claims only if its own have too
-- few free places. Otherwise one claim that shares would make all claims share that begin while it
-- runs, and those would make the next ones share, without end.
-- Parameters:
--   slots  the slots that belong to this claim (none if its transaction has claimed before)
-- Returns: the same as claim()
-- Locks: those described at the top of this file. These claims run one at a time. A claim that has
-- waited 0.2 s for its turn takes no messages.
create or replace function claim_shared(consumer consumers, hint hints, wanted int,
                                        slots smallint[], moment timestamptz, until timestamptz,
                                        out taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    max_in_flight constant int := consumer.config ->> 'max_in_flight';
    number constant int := least(64, max_in_flight);
    sharing constant bigint := sharing_lock(consumer.id);
    -- The two session-level locks that must be released: the turn, and the sharing.
    turn boolean := false;
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
            within := slots || array(select n::smallint from generate_series(0, number - 1) n
                                     where n <> all (slots));
        end if;
        used := array_fill(0, array[number], array[0]);
        for k in select * from claims_in_progress(consumer.id) loop
            used[k.slot % number] := used[k.slot % number] + coalesce(k.used, 1000000);
        end loop;
        -- A later statement with a newer snapshot: leases that were committed in the meantime are
        -- counted twice, never left out.
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
    perform case when shares then pg_advisory_unlock_shared(sharing) end,
            pg_advisory_unlock(sharing + 1);
exception
    when others or query_canceled then
        perform case when shares then pg_advisory_unlock_shared(sharing) end,
                case when turn then pg_advisory_unlock(sharing + 1) end;
        raise;
end $$;
