create table orders (id bigint generated always as identity primary key, customer text, amount numeric(10, 2));
