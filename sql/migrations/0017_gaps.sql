-- The gap messages of the last 30 days, so that `cdcbridge status` names the latest ones without a look at the log.
--
-- record: of the message. consumers: the names of those that got it.
create table gaps (
    id        bigint      generated always as identity primary key,
    at        timestamptz not null default clock_timestamp(),
    record    jsonb       not null,
    consumers text[]      not null
);
