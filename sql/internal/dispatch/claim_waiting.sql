-- claim_waiting(consumer_id, ...): Call claim_waiting___id__(...) of this consumer.
--
-- make_dispatch() makes a binary search of the IF: one comparison after the other with the ids of
-- all queue consumers. ELSE serves a session that stays in its transaction, and has an older
-- version of this function, from before the consumer was added.
create or replace function claim_waiting(consumer_id int, hint hints, capacity smallint[],
                                         taken bigint[], own_claim bigint, moment timestamptz,
                                         until timestamptz, out all_taken bigint[],
                                         out plain boolean)
language plpgsql volatile as $$
declare
    k record;
begin
    if consumer_id = __id__ then
        k := claim_waiting___id__(hint, capacity, taken, own_claim, moment, until);
    else
        execute format('select * from claim_waiting_%s($1, $2, $3, $4, $5, $6)', consumer_id) into k
            using hint, capacity, taken, own_claim, moment, until;
    end if;
    all_taken := k.all_taken;
    plain := k.plain;
end $$;
