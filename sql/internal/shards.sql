-- max_in_flight: how many messages a claim may take. All claims of a consumer together never exceed
-- the limit, in whichever order they commit.
--
-- The limit is divided into up to 64 shards. For example, a max_in_flight of 1000 has 64 shards
-- with a capacity of 15 or 16 messages each. Usually a claim does not share its shards: it holds
-- their locks to the end of its transaction, and it counts their leases after it has the locks.
--
-- Other transactions cannot see the leases of a claim before it commits. Therefore a claim that has
-- taken its messages reports, by further locks, how much of each shard it uses, if the shard is one
-- that it has not filled. A claim that finds too few free shards can then share the shards of other
-- claims: it counts the committed leases and adds the reported numbers. While such a claim is not
-- committed, all claims of the consumer run one at a time and add the reported numbers.
--
-- All of these are advisory locks:
--   (leases, consumer * 64 + shard), exclusive: no other claim uses the shard.
--   (hints, consumer, shard, number), shared: this transaction has `number` messages in the
--     shard whose leases are not committed.
--   leases << 32 | consumer * 2, shared: the holder shares shards. If a claim can take this lock
--     exclusively for a moment, no other claim shares shards.
--   leases << 32 | consumer * 2 + 1, exclusive, for the duration of one claim: claims run one at a
--     time while a claim shares shards.

-- take_shards(consumer_id, max_in_flight, wanted, shards) -> `shards`, and further shards that
-- belong to this transaction until it ends.
--
-- Together they have room for `wanted` messages if nothing is in flight. If too few shards are
-- free, all free ones are returned.
-- Locks: an advisory transaction lock for each shard. The function never waits for one.
create or replace function take_shards(consumer_id int, max_in_flight int, wanted int,
                                      shards smallint[])
returns smallint[]
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    class constant int := 'leases'::regclass::oid::int;
    shard int := floor(random() * number);
begin
    for i in 1 .. number loop
        if shard <> all (shards)
            and pg_try_advisory_xact_lock(class, take_shards.consumer_id * 64 + shard) then
            shards := shards || shard::smallint;
        end if;
        exit when cardinality(shards) * (max_in_flight / number) >= wanted;
        shard := (shard + 1) % number;
    end loop;
    return shards;
end $$;

-- survey(consumer_id, hint, max_in_flight, wanted, shards, told, moment): Find the free
-- capacity of these shards.
--
-- The caller holds the locks of the shards, so the snapshot of this function is newer than the
-- locks.
-- Parameters:
--   told  for each shard, the number of messages that other claims hold and have not committed
--         (null if no claim shares shards and `shards` belong to this claim)
-- Returns:
--   capacity  a shard for each message that the claim may take, at most `wanted`. For example,
--             {7,7,7,8}: three messages may count on shard 7, and one on shard 8.
--   expired   true if there are leases whose visibility timeout has passed, otherwise null
--   due       true if there are messages in `delayed` that are due, otherwise null
create or replace function survey(consumer_id int, hint hints, max_in_flight int, wanted int,
                                  shards smallint[], told int[], moment timestamptz,
                                  out capacity smallint[], out expired boolean, out due boolean)
language plpgsql volatile as $$
declare
    number constant int := least(64, max_in_flight);
    used int[] := coalesce(told, array_fill(0, array[number], array[0]));
    l record;
    free int;
begin
    for l in
        -- Modulo, because the limit may have been lowered since the lease was made.
        select v.shard % number as shard,
               case when v.not_visible_until > moment then cardinality(v.seqs) - (
                   select count(*) from marks_of(v.consumer_id, v.claim_id, v.part))::int end
               as size
        from live_leases(survey.consumer_id, hint) v
        union all
        (select null, null from delayed d
         where d.consumer_id = survey.consumer_id and d.visible_at > '-infinity'
           and d.visible_at <= moment limit 1)
    loop
        if l.size is not null then
            used[l.shard] := used[l.shard] + l.size;
        elsif l.shard is not null then
            expired := true;
        else
            due := true;
        end if;
    end loop;
    capacity := '{}';
    for i in 1 .. cardinality(shards) loop
        free := max_in_flight / number + (shards[i] < max_in_flight % number)::int
            - used[shards[i]];
        capacity := capacity || array_fill(
            shards[i], array[greatest(0, least(free, wanted - cardinality(capacity)))]);
    end loop;
end $$;

-- sharing_lock(consumer_id) -> the key of the advisory lock of claims that share shards.
--
-- The next number is the key of the lock under which claims run one at a time.
create or replace function sharing_lock(consumer_id int) returns bigint
language sql stable as $$
    select 'leases'::regclass::oid::bigint << 32 | (consumer_id::bigint * 2 & 4294967295)
$$;

-- somebody_shares(sharing) -> whether another transaction shares shards.
--
-- claim() calls this function after it could not take the lock exclusively. Either another
-- transaction shares shards, or another claim held the lock exclusively at that moment, to make the
-- same check. In the second case the lock cannot be taken in shared mode, so no transaction shares
-- shards. The shared mode is tried twice, because a claim that held the lock exclusively may just
-- have released it.
create or replace function somebody_shares(sharing bigint) returns boolean
language plpgsql volatile as $$
begin
    return pg_try_advisory_lock_shared(sharing) and pg_advisory_unlock_shared(sharing)
        and not (pg_try_advisory_lock(sharing) and pg_advisory_unlock(sharing))
        and pg_try_advisory_lock_shared(sharing) and pg_advisory_unlock_shared(sharing);
end $$;

-- told_lock(consumer_id, shard, number) -> the second half of the key of the lock that reports
-- `number` messages in the shard.
--
-- The function has no SET clause, so PostgreSQL inlines it. It is short, because each transaction
-- prepares its expressions anew.
create or replace function told_lock(consumer_id int, shard int, number int) returns int
language sql immutable as $$
    select (consumer_id << 20) | (shard << 14) | least(number, 16383)
$$;

-- tell_claim(consumer_id, capacity, shards): Report to other claims how much capacity this
-- transaction uses.
--
-- It uses `capacity`, in addition to what it reported before. `shards` belong to this transaction
-- alone, and it uses no more of them. A shard that it filled before is not reported.
-- Locks: a shared lock for each reported shard, to the end of the transaction.
create or replace function tell_claim(consumer_id int, capacity smallint[], shards smallint[])
returns void
language plpgsql volatile as $$
declare
    class constant int := 'hints'::regclass::oid::int;
    setting constant text := 'cdcbridge.claimed_' || consumer_id;
    told constant text := coalesce(current_setting(setting, true), '');
    full_ones constant int[] := case when told = '' then '{}' else array(
        select s from unnest(own_shards(consumer_id)) s
        where s <> all (shards)
          and s not in (select b::int >> 14 from unnest(string_to_array(told, ' ')) b)) end;
begin
    perform set_config(setting, coalesce(string_agg(told_lock(0, t.shard, t.number)::text, ' '),
                                         nullif(told, ''), '0'), true),
            count(pg_advisory_xact_lock_shared(
                class, told_lock(consumer_id, t.shard, t.number))::text)
    from (select u.shard, sum(u.number)::int as number
          from (select s::int, 0 from unnest(shards) s
                union all
                select p::int, count(*)::int from unnest(capacity) p group by p
                union all
                select b::int >> 14, b::int & 16383 from unnest(string_to_array(told, ' ')) b
                where b <> '') u (shard, number)
          where u.shard <> all (full_ones)
          group by u.shard) t;
end $$;

-- own_shards(consumer_id) -> the shards that belong to this transaction alone.
create or replace function own_shards(consumer_id int) returns int[]
language sql volatile as $$
    select array(select (l.objid::bigint % 64)::int from pg_locks l
                 where l.locktype = 'advisory' and l.objsubid = 2 and l.granted
                   and l.pid = pg_backend_pid() and l.classid = 'leases'::regclass
                   and l.mode = 'ExclusiveLock' and l.objid::bigint / 64 = $1)
$$;

-- claims_in_progress(consumer_id) -> the shards that other transactions use and have not committed.
--
-- used is the number of messages that a transaction has reported. It is null if a transaction has
-- the shard to itself and either fills it or has not reported yet.
create or replace function claims_in_progress(consumer_id int) returns table (shard int, used int)
language sql volatile as $$
    with held as materialized (
        select l.virtualtransaction as holder, l.classid = 'hints'::regclass as tells,
               (case when l.classid = 'hints'::regclass then l.objid::bigint >> 14
                     else l.objid::bigint end % 64)::int as shard,
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
    select t.shard, sum(t.used)::int
    from (select h.holder, h.shard, max(h.used) as used from held h where h.tells group by 1, 2) t
    group by t.shard
    union all
    select h.shard, null from held h
    where not h.tells and not exists (select from held t
                                      where t.holder = h.holder and t.tells and t.shard = h.shard)
$$;

-- claim_shared(consumer, hint, wanted, shards, moment, until): Do a claim that takes the
-- uncommitted claims of other transactions into account.
--
-- The claim first uses its own shards. It shares the shards of other claims only if its own have
-- too little free capacity. Otherwise one claim that shares would make all claims share that begin
-- while it runs, and those would make the next ones share, without end.
-- Parameters:
--   shards  the shards that belong to this claim (none if its transaction has claimed before)
-- Returns: the same as claim()
-- Locks: those described at the top of this file. These claims run one at a time. A claim that has
-- waited 0.2 s for its turn takes no messages.
create or replace function claim_shared(consumer consumers, hint hints, wanted int,
                                        shards smallint[], moment timestamptz, until timestamptz,
                                        out taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    max_in_flight constant int := consumer.config ->> 'max_in_flight';
    number constant int := least(64, max_in_flight);
    sharing constant bigint := sharing_lock(consumer.id);
    -- The two session-level locks that must be released: the turn, and the sharing.
    turn boolean := false;
    shares boolean := false;
    within smallint[] := shards;
    used int[];
    capacity smallint[];
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
        perform tell_claim(consumer.id, '{}', shards);
        return;
    end if;
    for attempt in 1 .. 2 loop
        if attempt = 2 or shards = '{}' then
            perform pg_advisory_lock_shared(sharing);
            shares := true;
            within := shards || array(select n::smallint from generate_series(0, number - 1) n
                                     where n <> all (shards));
        end if;
        used := array_fill(0, array[number], array[0]);
        for k in select * from claims_in_progress(consumer.id) loop
            used[k.shard % number] := used[k.shard % number] + coalesce(k.used, 1000000);
        end loop;
        -- A later statement with a newer snapshot: leases that were committed in the meantime are
        -- counted twice, never left out.
        look := survey(consumer.id, hint, max_in_flight, wanted, within, used, moment);
        exit when shares or cardinality(look.capacity) >= wanted;
    end loop;
    select c.taken, c.plain into taken, plain
    from claim(consumer, wanted, moment, until, look.capacity, look.expired, look.due) c;
    capacity := look.capacity[:cardinality(taken)];
    perform tell_claim(consumer.id, capacity, shards);
    if shares and not capacity::int[] <@ own_shards(consumer.id) then
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
