-- claim_waiting___id__(hint, capacity, taken, own_claim, moment, until): Claim messages of a queue
-- consumer that are delivered for the first time, or for the first time after a redrive.
--
-- The function takes whole rows of `waiting`, and the first messages of the last row.
-- Returns: in all_taken, `taken` followed by the seqs of these messages, and plain as in
-- claim()
-- Locks: the rows, by SKIP LOCKED.
create or replace function claim_waiting___id__(hint hints, capacity smallint[], taken bigint[],
                                                own_claim bigint, moment timestamptz,
                                                until timestamptz, out all_taken bigint[],
                                                out plain boolean)
language plpgsql volatile as $$
declare
    cur refcursor; -- a cursor locks no more rows than the claim needs
    r record;
    room int := cardinality(capacity) - cardinality(taken);
    done tid[];    -- rows taken as a whole (being locked, they keep their ctids)
    -- Messages that are claimed and not in leases yet: all with keys of their own, or none.
    seqs_ bigint[];
    keys_ text[];
    since timestamptz;
    last bigint := 0;
begin
    plain := taken = '{}';
    if hint.passed = '{}' then
        open cur for
            select w.ctid, w.tie, w.seqs, w.keys, w.inserted_at from waiting___id__ w
            where w.consumer_id = __id__ and w.ord >= hint.waiting_floor
            order by w.ord, w.tie for update skip locked;
    else
        open cur for
            select w.* from live_waiting___id__(hint) l cross join lateral (
                select w.ctid, w.tie, w.seqs, w.keys, w.inserted_at from waiting___id__ w
                where w.consumer_id = __id__ and w.ord = l.ord and w.tie = l.tie
                for update skip locked) w;
    end if;
    loop
        fetch cur into r;
        exit when not found;
        own_claim := coalesce(own_claim, draw_claim_id());
        if cardinality(r.seqs) > room then
            update waiting___id__ w set seqs = r.seqs[room + 1:], keys = r.keys[room + 1:]
            where w.ctid = r.ctid;
            r.seqs := r.seqs[:room];
            r.keys := r.keys[:room];
        else
            done := done || r.ctid;
        end if;
        room := room - cardinality(r.seqs);
        if (keys_ is null) <> (r.keys is null) and seqs_ is not null then
            taken := insert_claimed(__id__, own_claim, capacity, taken, seqs_, keys_, moment, until,
                                    since);
            seqs_ := null; keys_ := null; since := null;
        end if;
        -- PostgreSQL appends one element in place. To concatenate two arrays, it copies both.
        if cardinality(r.seqs) = 1 then
            seqs_ := seqs_ || r.seqs[1];
            if r.keys is not null then
                keys_ := keys_ || r.keys[1];
            end if;
        else
            seqs_ := seqs_ || r.seqs;
            keys_ := keys_ || r.keys;
        end if;
        since := coalesce(since, r.inserted_at);
        plain := plain and r.tie = 0 and r.seqs[1] > last;
        last := r.seqs[cardinality(r.seqs)];
        exit when room = 0;
    end loop;
    close cur;
    if done is not null then
        delete from waiting___id__ w where w.ctid = any (done);
    end if;
    all_taken := insert_claimed(__id__, own_claim, capacity, taken, seqs_, keys_, moment, until,
                                since);
end $$;
