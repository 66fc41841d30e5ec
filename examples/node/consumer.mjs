// A consumer in Node: `npm ci && node consumer.mjs DSN CONSUMER` handles messages until SIGTERM.
// It takes any table and any topic. It prints what it gets.
//
// The handler's writes and the ack are one transaction: with `strict`, a message that somebody else has got in the meantime
// rolls both back. What throws comes again after the consumer's back-off. Write your effects into a schema of their own, which
// no consumer takes.
//
// `data` is fetched as text: JSON.parse would make 9007199254740993 a 9007199254740992. lossless-json keeps all digits: a number
// is a LosslessNumber, `String(number)` its text, `BigInt(String(number))` a whole one.
import { parse, stringify } from "lossless-json";
import pg from "pg";

const RECEIVE = "select receipt, seq, topic, key, data::text as data from cdcbridge.receive($1, 10)";

const [dsn, consumer] = process.argv.slice(2);
const client = new pg.Client({ connectionString: dsn });
let stopping = false;
let notified = false;
let wake = () => {};

async function handle(message, { op, record }) {
  switch (op) {
    case "insert":
    case "update":
    case "read": // of a backfill or a snapshot: a row as it is now
    case "message": // published by an application
    case "delete": // the row's key, or all of it under REPLICA IDENTITY FULL
      console.log(message.topic, message.key, op, stringify(record));
      break;
    case "truncate": // no record and no key: the table is empty
      console.log(message.topic, "is empty");
      break;
    case "gap": // changes between two positions are not in the log
      console.log("changes are missing:", stringify(record));
      break;
    default:
      throw new Error(`unknown op ${op}`);
  }
}

function read(message) {
  try {
    return parse(message.data);
  } catch {
    return null; // JSON that Node cannot hold, such as one that is nested too deeply
  }
}

async function settle(message) {
  const data = read(message);
  if (data === null) {
    const reason = "its data cannot be read";
    await client.query("select cdcbridge.nack($1, $2, reason => $3, dead => true)", [consumer, [message.receipt], reason]);
    return;
  }
  await client.query("begin isolation level read committed");
  try {
    await handle(message, data);
    await client.query("select cdcbridge.ack($1, $2, strict => true)", [consumer, [message.receipt]]);
    await client.query("commit");
  } catch (error) {
    await client.query("rollback");
    if (error.code === "CB006") return; // the receipt is stale: nothing to give back
    await client.query("select cdcbridge.nack($1, $2, reason => $3)", [consumer, [message.receipt], String(error)]);
  }
}

// Sleeps until something is appended, a timeout or a delay ends, or 10 s have passed: a notification may be lost.
async function wait() {
  const { rows } = await client.query("select least(10, cdcbridge.next_visible($1)) as seconds", [consumer]);
  if (stopping || notified) return;
  await new Promise((resolve) => {
    const timer = setTimeout(resolve, Math.max(0.01, rows[0].seconds) * 1000);
    wake = () => (clearTimeout(timer), resolve());
  });
}

process.on("SIGTERM", () => ((stopping = true), wake()));
client.on("notification", () => ((notified = true), wake()));
await client.connect();
// Whatever the server's defaults are: receive() refuses other isolation levels.
await client.query("set session characteristics as transaction isolation level read committed, read write");
await client.query("listen cdcbridge");
while (!stopping) {
  notified = false;
  const { rows } = await client.query(RECEIVE, [consumer]);
  for (const message of rows) await settle(message);
  if (rows.length === 0) await wait();
}
await client.end();
