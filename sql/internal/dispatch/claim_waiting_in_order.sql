-- claim_waiting_in_order(consumer_id, ...): Call claim_in_order___id__(...) of this consumer.
--
-- make_dispatch() makes a binary search of the IF, as in claim_waiting().
create or replace function claim_waiting_in_order(consumer_id int, hint hints, capacity smallint[],
                                                  taken bigint[], own_claim bigint,
                                                  moment timestamptz, until timestamptz,
                                                  safe bigint)
returns bigint[]
language plpgsql volatile as $$
begin
    if consumer_id = __id__ then
        taken := claim_in_order___id__(hint, capacity, taken, own_claim, moment, until, safe);
    else
        execute format('select claim_in_order_%s($1, $2, $3, $4, $5, $6, $7)', consumer_id)
            into taken using hint, capacity, taken, own_claim, moment, until, safe;
    end if;
    return taken;
end $$;
