-- claim_waiting___id__(hint, places, taken, claimed, moment, until) -> `taken` and the messages of a queue consumer that are delivered
-- for the first time (or anew after a redrive). Takes whole rows of `waiting`, and the front of the last one.
create or replace function claim_waiting___id__(hint hints, places smallint[], taken bigint[], claimed bigint,
                                              moment timestamptz, until timestamptz, out all_taken bigint[], out plain boolean)
language plpgsql volatile as $$
declare
    cur refcursor; -- so that no row is locked that is not needed
    r record;
    room int := cardinality(places) - cardinality(taken);
    done tid[];    -- whole rows; they are locked, so they stay where they are
    seqs_ bigint[]; -- claimed, and not in leases yet: all with keys of their own, or none
    keys_ text[];
    since timestamptz;
    last bigint := 0;
begin
    plain := taken = '{}';
    if hint.passed = '{}' then
        open cur for
            select w.ctid, w.tie, w.seqs, w.keys, w.inserted_at from waiting___id__ w
            where w.consumer_id = __id__ and w.ord >= hint.waiting_floor order by w.ord, w.tie for update skip locked;
    else
        open cur for
            select w.* from live_waiting___id__(hint) l cross join lateral (
                select w.ctid, w.tie, w.seqs, w.keys, w.inserted_at from waiting___id__ w
                where w.consumer_id = __id__ and w.ord = l.ord and w.tie = l.tie for update skip locked) w;
    end if;
    loop
        fetch cur into r;
        exit when not found;
        claimed := coalesce(claimed, draw_token());
        if cardinality(r.seqs) > room then
            update waiting___id__ w set seqs = r.seqs[room + 1:], keys = r.keys[room + 1:] where w.ctid = r.ctid;
            r.seqs := r.seqs[:room];
            r.keys := r.keys[:room];
        else
            done := done || r.ctid;
        end if;
        room := room - cardinality(r.seqs);
        if (keys_ is null) <> (r.keys is null) and seqs_ is not null then
            taken := insert_claimed(__id__, claimed, places, taken, seqs_, keys_, moment, until, since);
            seqs_ := null; keys_ := null; since := null;
        end if;
        if cardinality(r.seqs) = 1 then -- appends in place; the concatenation of two arrays copies both
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
    all_taken := insert_claimed(__id__, claimed, places, taken, seqs_, keys_, moment, until, since);
end $$;
