-- claim_waiting_in_order(consumer_id, ...): Call claim_in_order_<id>(...) of this consumer.
create or replace function claim_waiting_in_order(consumer_id int, hint hints, places smallint[],
                                                  taken bigint[], claimed bigint,
                                                  moment timestamptz, until timestamptz,
                                                  safe bigint)
returns bigint[]
language plpgsql volatile as $$
begin
    __calls__
    return taken;
end $$;
