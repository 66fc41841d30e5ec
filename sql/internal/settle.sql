-- Settling deliveries: the changes that ack(), nack() and give_back() make to leases.
--
-- A receipt is valid for one delivery, until the visibility timeout of that delivery passes.

-- parse_receipts(receipts) -> the seq and the claim of each receipt, in the same order.
--
-- Raises:
--   CB003  a text is not a receipt
create or replace function parse_receipts(receipts text[]) returns receipt[]
language plpgsql immutable as $$
begin
    if exists (select from unnest(receipts) r where r is null or split_part(r, '-', 3) <> '') then
        raise invalid_text_representation;
    end if;
    return array(select row(split_part(r, '-', 1), split_part(r, '-', 2))::receipt
                 from unnest(receipts) r);
exception
    when invalid_text_representation or numeric_value_out_of_range then
        raise exception '% is not a receipt', quote_nullable((
            select r from unnest(receipts) r
            where r is null or r !~ '^[0-9]{1,18}-[0-9]{1,18}$' limit 1))
            using errcode = 'CB003',
                  hint = 'Pass a receipt as receive() returned it.';
end $$;

-- settle_claim(consumer_id, receipts, moment) -> the seqs that were settled by deleting all rows of
-- a claim, or one row of it.
--
-- The result is null if the receipts are not exactly those of the claim or of the row, in its
-- order. Most receivers ack exactly that. Therefore the receipts are compared as text, without
-- parsing.
-- Locks: the rows that it deletes.
create or replace function settle_claim(consumer_id int, receipts text[], moment timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    suffix constant text := '-' || split_part(receipts[1], '-', 2);
    given_claim constant bigint := case when translate(receipts[1], '0123456789-', '') = ''
                                         and length(suffix) between 2 and 19
                                    then substr(suffix, 2) end;
    number constant int := cardinality(receipts);
    given constant text := array_to_string(receipts, ',');
    row_part int;
    row_seqs bigint[];
    parts int[];
    gone bigint[];
begin
    -- Delete a row that holds exactly these messages,
    delete from leases l
    where l.consumer_id = settle_claim.consumer_id
      and l.claim_id = given_claim and l.not_visible_until > moment
      and cardinality(l.seqs) = number and array_to_string(l.seqs, suffix || ',') || suffix = given
    returning array[l.part], l.seqs into parts, gone;
    if gone is null and number > 1 then
        -- or all rows of the claim.
        for row_part, row_seqs in
            delete from leases l
            where l.consumer_id = settle_claim.consumer_id and l.claim_id = given_claim
              and l.not_visible_until > moment
              and (number, given) = (
                  select sum(cardinality(o.seqs)),
                         string_agg(array_to_string(o.seqs, suffix || ',') || suffix, ','
                                    order by abs(o.part))
                  from leases o
                  where o.consumer_id = settle_claim.consumer_id and o.claim_id = given_claim)
            returning l.part, l.seqs
        loop
            parts := parts || row_part;
            gone := gone || row_seqs;
        end loop;
    end if;
    -- A statement of its own: it sees the marks that another session made while the deletion
    -- waited.
    if gone is not null
        and (exists (select from settled s
                     where s.consumer_id = settle_claim.consumer_id and s.claim_id = given_claim)
             or exists (select from redriven r where r.consumer_id = settle_claim.consumer_id))
    then
        with cleared as (
            delete from settled s
            where s.consumer_id = settle_claim.consumer_id and s.claim_id = given_claim
              and s.part = any (parts)
            returning s.seq)
        select without(gone, array(select c.seq from cleared c)) into gone;
        perform forget_redriven(consumer_id, gone);
    end if;
    return gone;
end $$;

-- without(seqs, marked) -> the messages of these rows of leases that had not been settled before.
--
-- Each mark removes one copy of its seq. A message that extend() moved into a row of its own is
-- contained in both rows, and it is marked in the row from which it was taken.
create or replace function without(seqs bigint[], marked bigint[]) returns bigint[]
language sql immutable as $$
    select array(select unnest(seqs) except all select unnest(marked))
$$;

-- settle(consumer_id, receipts, moment) -> the seqs of the deliveries that were in flight
-- and are now settled.
--
-- A row of leases is deleted when all its messages are settled. Before that, each settled message
-- has a mark in the table settled. Therefore sessions that settle different messages of one claim
-- do not wait for each other, and sessions that settle the same message do.
-- Raises:
--   40001  above READ COMMITTED only: see isolation.sql
create or replace function settle(consumer_id int, receipts receipt[], moment timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    gone bigint[];
begin
    if above_read_committed() then
        return settle_by_marks(consumer_id, receipts, moment);
    end if;
    gone := settle_whole(consumer_id, receipts, moment);
    if cardinality(gone) < cardinality(receipts) then
        gone := gone || settle_some(consumer_id, receipts, gone, moment, moved => false);
    end if;
    if cardinality(gone) < cardinality(receipts) then
        gone := gone || settle_moved(consumer_id, receipts, gone, moment);
    end if;
    return gone;
end $$;

-- settle_whole(consumer_id, receipts, moment) -> the seqs that were settled by deleting rows of
-- leases that hold no other unsettled message.
--
-- Locks: the rows that it deletes.
create or replace function settle_whole(consumer_id int, receipts receipt[], moment timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    claims constant bigint[] := array(select distinct r.claim_id from unnest(receipts) r);
    gone bigint[];
    whole lease_id[];
begin
    with removed as (
        delete from leases l
        where l.not_visible_until > moment and l.ctid = any (array(
            select l.ctid
            from unnest(claims) as t (claim_id) cross join lateral (
                select l.ctid, l.* from leases l
                where l.consumer_id = settle_whole.consumer_id
                    and l.claim_id = t.claim_id offset 0) l
            where not exists (
                select from unsettled(l.consumer_id, l.claim_id, l.part, l.seqs, null) u
                -- Usually there is one claim, and numbers are compared faster than pairs.
                where case when cardinality(claims) = 1
                           then u.seq not in (select g.seq from unnest(receipts) g)
                           else (l.claim_id, u.seq) not in (select g.claim_id, g.seq
                                                            from unnest(receipts) g)
                      end)))
        returning l.claim_id, l.part, l.seqs)
    select array_agg(row(r.claim_id, r.part)::lease_id),
           (select coalesce(array_agg(u.seq), '{}')
            from removed r cross join lateral unnest(r.seqs) as u (seq))
    into whole, gone from removed r;
    return case when whole is null then gone else clear_marks(consumer_id, whole, gone) end;
end $$;

-- clear_marks(consumer_id, whole, gone) -> the messages of deleted rows of leases that had not been
-- settled before.
--
-- It also deletes the marks of these rows. As a statement of its own, it sees the marks that
-- another session made while the deletion of the rows waited.
create or replace function clear_marks(consumer_id int, whole lease_id[], gone bigint[])
returns bigint[]
language plpgsql volatile as $$
declare
    marked bigint[];
begin
    with cleared as (
        delete from settled s using unnest(whole) w
        where s.consumer_id = clear_marks.consumer_id and s.claim_id = w.claim_id
            and s.part = w.part
        returning s.seq)
    select array(select c.seq from cleared c) into marked;
    return case when marked = '{}' then gone else without(gone, marked) end;
end $$;

-- settle_some(consumer_id, receipts, gone, moment, moved) -> the seqs that this call has marked as
-- settled.
--
-- Parameters:
--   gone   the seqs that were settled before and are skipped
--   moved  whether to mark also messages that extend() moved into a row of their own. Such a
--          message gets a mark in both rows. The row from which it was taken already has its mark,
--          so the message is counted once.
-- Locks: the rows of leases, FOR KEY SHARE. A receiver that claims expired deliveries skips rows
-- with this lock, and extend() does not wait for it.
create or replace function settle_some(consumer_id int, receipts receipt[], gone bigint[],
                                       moment timestamptz, moved boolean)
returns bigint[]
language plpgsql volatile as $$
declare
    touched lease_id[];
    marked bigint[];
begin
    -- Sets are compared by hash. A claim may hold 100,000 messages, and `= any` or && would compare
    -- each pair of them.
    with given as materialized (
        select g.claim_id, g.seq from unnest(receipts) g
        where g.seq not in (select s from unnest(gone) s)
    ), held as materialized (
        select l.claim_id, l.part, l.seqs
        from (select distinct g.claim_id from given g order by g.claim_id) t
        cross join lateral (
            select l.claim_id, l.part, l.seqs from leases l
            where l.consumer_id = settle_some.consumer_id and l.claim_id = t.claim_id
              and l.not_visible_until > moment
              and exists (select from unnest(l.seqs) as u (seq)
                          where case when true then (l.claim_id, u.seq) in (
                              select g.claim_id, g.seq from given g) end)
            order by l.part for key share) l
    ), named as materialized (
        select h.claim_id, h.part, u.seq from held h cross join lateral unnest(h.seqs) as u (seq)
        where h.part > 0 or moved
    ), made as (
        insert into settled (consumer_id, claim_id, part, seq)
        select settle_some.consumer_id, n.claim_id, n.part, n.seq
        from named n
        where case when true then (n.claim_id, n.seq) in (select g.claim_id, g.seq from given g) end
        order by n.claim_id, n.part, n.seq
        on conflict do nothing
        returning claim_id, part, seq)
    select array_agg(row(m.claim_id, m.part)::lease_id), coalesce(array_agg(m.seq), '{}')
    into touched, marked from made m;
    if touched is not null then
        perform remove_finished(consumer_id, touched);
    end if;
    return marked;
end $$;

-- remove_finished(consumer_id, ids): Delete those of these rows of leases whose messages are all
-- settled, together with their marks.
--
-- Usually the session that settles the last message does this. If two sessions settle the last two
-- messages at the same time, neither sees the mark of the other. Then the row remains until its
-- visibility timeout has passed, or until forget_settled() deletes it.
-- Locks: the rows that it deletes, by SKIP LOCKED.
create or replace function remove_finished(consumer_id int, ids lease_id[]) returns void
language plpgsql volatile as $$
begin
    with full_row as materialized (
        select l.claim_id, l.part
        from (select distinct i.claim_id, i.part from unnest(ids) i) t
        cross join lateral (
            select l.claim_id, l.part from leases l
            where l.consumer_id = remove_finished.consumer_id and l.claim_id = t.claim_id
              and l.part = t.part
              and cardinality(l.seqs)
                  <= (select count(*) from marks_of(l.consumer_id, l.claim_id, l.part))
            for update skip locked) l
    ), finished as (
        delete from leases l using full_row f
        where l.consumer_id = remove_finished.consumer_id and l.claim_id = f.claim_id
            and l.part = f.part
        returning l.claim_id, l.part)
    delete from settled s using finished f
    where s.consumer_id = remove_finished.consumer_id and s.claim_id = f.claim_id
        and s.part = f.part;
end $$;

-- settle_moved(consumer_id, receipts, gone, moment) -> the seqs of messages that are settled in
-- rows of their own.
--
-- extend() moved these messages into such rows while this call waited for their old row.
create or replace function settle_moved(consumer_id int, receipts receipt[], gone bigint[],
                                        moment timestamptz)
returns bigint[]
language plpgsql volatile as $$
declare
    moved receipt[];
begin
    select array_agg(row(g.seq, g.claim_id)::receipt) into moved
    from unnest(receipts) g
    cross join lateral (
        select l.not_visible_until from leases l
        where l.consumer_id = settle_moved.consumer_id and l.claim_id = g.claim_id and l.part < 0
          and l.seqs[1] = g.seq
        offset 0) l
    where g.seq not in (select s from unnest(gone) s) and l.not_visible_until > moment;
    if moved is null then
        return '{}';
    end if;
    return settle(consumer_id, moved, moment);
end $$;

-- remove_locked(consumer_id, deliveries): Take these deliveries out of their leases.
--
-- The transaction holds the locks of their rows of leases.
create or replace function remove_locked(consumer_id int, deliveries delivery[]) returns void
language plpgsql volatile as $$
begin
    if deliveries <> '{}' then
        insert into settled (consumer_id, claim_id, part, seq)
        select remove_locked.consumer_id, d.claim_id, d.part, d.seq from unnest(deliveries) d;
        perform remove_finished(consumer_id, array(select row(d.claim_id, d.part)::lease_id
                                                   from unnest(deliveries) d));
    end if;
end $$;

-- refuse_stale(consumer, receipts, acked): Raise an error that names the receipts whose messages
-- are not among the acked ones.
--
-- Raises:
--   CB006  there is such a receipt
create or replace function refuse_stale(consumer text, receipts receipt[], acked bigint[])
returns void
language plpgsql stable as $$
declare
    stale text := (select string_agg(r.seq || '-' || r.claim_id, ', ' order by r.seq)
                   from unnest(receipts) r
                   where r.seq not in (select a from unnest(acked) a));
begin
    if stale is null then
        return; -- a receipt was given twice
    end if;
    raise exception 'stale receipt for consumer %: %', quote_literal(consumer), stale
        using errcode = 'CB006', hint =
            'The delivery''s visibility timeout has passed, or it was acked or given back before.';
end $$;

-- forget_redriven(consumer_id, seqs): Delete the stored content of redriven messages that are
-- finished.
create or replace function forget_redriven(consumer_id int, seqs bigint[]) returns void
language plpgsql volatile as $$
begin
    if exists (select from redriven d where d.consumer_id = forget_redriven.consumer_id) then
        delete from redriven d
        where d.consumer_id = forget_redriven.consumer_id and d.seq = any (seqs);
    end if;
end $$;

-- make_counters(consumer_id): Create the sequences in which count_acked() counts.
create or replace function make_counters(consumer_id int) returns void
language plpgsql as $$
declare
    unit int;
begin
    foreach unit in array '{1,10,100}'::int[] loop
        -- Each nextval() adds the unit, so the last value is what the sequence has counted.
        execute format('create sequence %I increment %s start %2$s owned by %I.consumer_id',
                       'acked_' || consumer_id || '_' || unit, unit, 'waiting_' || consumer_id);
    end loop;
end $$;

-- count_acked(consumer_id, number): Add to the number of messages that were acked.
--
-- An update of a row would make each ack wait for the others. A sequence does not wait, and it
-- writes to the WAL at each 32nd call only. For example, 127 acks are a call of the sequence of
-- hundreds, two of the sequence of tens, and seven of the sequence of ones.
-- An ack that is rolled back is counted, too. A crash of the server can add up to 32 calls of each
-- sequence.
create or replace function count_acked(consumer_id int, number int) returns void
language plpgsql volatile as $$
declare
    unit int;
    counter regclass;
    counted bigint;
begin
    foreach unit in array '{100,10,1}'::int[] loop
        if number >= unit then
            counter := 'acked_' || consumer_id || '_' || unit;
            while number >= unit loop
                counted := nextval(counter); -- an expression costs less than a statement
                number := number - unit;
            end loop;
        end if;
    end loop;
end $$;

-- acked_messages(consumer_id) -> how many messages were acked since the consumer was added.
--
-- Returns: null for a stream.
create or replace function acked_messages(consumer_id int) returns bigint
language sql stable as $$
    select sum(coalesce(pg_sequence_last_value(s.counter), 0))::bigint
    from (select to_regclass('acked_' || $1 || '_' || u.unit) as counter
          from unnest('{1,10,100}'::int[]) u (unit)) s
    where s.counter is not null
$$;
