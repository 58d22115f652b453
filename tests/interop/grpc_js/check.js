// A gateway seen by @grpc/grpc-js: health, a streamed answer, cancellation, a deadline, error details.
// Usage: node check.js ADDRESS PROTO_DIRECTORY GOOGLE_PROTO_DIRECTORY
"use strict";

const assert = require("node:assert/strict");
const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const { protoPath: healthProto } = require("grpc-health-check");

const [address, protoDirectory, googleDirectory] = process.argv.slice(2);
const SERVICE = "specdec.v1.GatewayService";
const DETAILS = "grpc-status-details-bin";
const LONG = { text: "Count:", maxNewTokens: 400, ignoreEos: true, method: "none" };

const load = (files, ...includeDirs) =>
  loader.loadSync(files, { includeDirs, longs: Number, enums: String, defaults: true, oneofs: true });
const ours = grpc.loadPackageDefinition(load("specdec/v1/gateway.proto", protoDirectory));
const health = grpc.loadPackageDefinition(load(path.basename(healthProto), path.dirname(healthProto)));
const details = load(["google/rpc/status.proto", "google/rpc/error_details.proto"], googleDirectory);

const credentials = grpc.credentials.createInsecure();
const gateway = new ours.specdec.v1.GatewayService(address, credentials);
const healthClient = new health.grpc.health.v1.Health(address, credentials);

const unary = (client, method, request) =>
  new Promise((resolve, reject) =>
    client[method](request, { deadline: Date.now() + 20_000 }, (error, response) =>
      error ? reject(error) : resolve(response),
    ),
  );

/** Messages of an answer and the status it ended with; `onMessage` is given each and the call. */
const generate = (request, options = {}, onMessage = () => {}) =>
  new Promise((resolve) => {
    const messages = [];
    const call = gateway.Generate(request, { deadline: Date.now() + 60_000, ...options });
    call.on("data", (message) => {
      messages.push(message);
      onMessage(message, call);
    });
    call.on("error", () => {}); // the status says it, too
    call.on("status", (status) => resolve({ messages, status }));
  });

const numSessions = async () => {
  const info = await unary(gateway, "GetInfo", {});
  return info.verifiers.reduce((sum, replica) => sum + replica.verifier.numSessions, 0);
};

const untilIdle = async () => {
  for (let tries = 0; tries < 100; tries++) {
    if ((await numSessions()) === 0) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.fail("a session is still held");
};

/** The details of a status by the name of their type. */
const detailsOf = (status) => {
  const [bytes] = status.metadata.get(DETAILS);
  const read = (name, data) => details[name].deserialize(data);
  return Object.fromEntries(
    read("google.rpc.Status", bytes).details.map((any) => {
      const name = any.typeUrl ?? any.type_url;
      const type = name.slice(name.lastIndexOf("/") + 1);
      return [type, read(type, any.value)];
    }),
  );
};

const checks = {
  async health() {
    const { status } = await unary(healthClient, "Check", { service: SERVICE });
    assert.equal(status, "SERVING");
    return `${SERVICE} is ${status}`;
  },

  async generate() {
    const { messages, status } = await generate({ text: "Count:", maxNewTokens: 16, ignoreEos: true });
    assert.equal(status.code, grpc.status.OK);
    assert.equal(messages[0].message, "started");
    const tokens = messages.flatMap((message) => message.chunk?.tokens ?? []);
    const { finished } = messages.at(-1);
    assert.equal(tokens.length, 16);
    assert.equal(finished.usage.outputTokens, 16);
    assert.equal(finished.finishReason, "FINISH_REASON_LENGTH");
    return `${tokens.length} tokens in ${messages.length} messages: ${JSON.stringify(tokens.map((t) => t.text).join(""))}`;
  },

  async cancel() {
    let during = 0;
    const { messages, status } = await generate(LONG, {}, async (message, call) => {
      if (message.message !== "chunk" || during) return;
      during = 1;
      during = await numSessions();
      call.cancel();
    });
    assert.equal(status.code, grpc.status.CANCELLED);
    assert.equal(during, 1, "the answer held a session while it ran");
    await untilIdle();
    return `cancelled after ${messages.length} messages, the session is free`;
  },

  async deadline() {
    const { messages, status } = await generate(LONG, { deadline: Date.now() + 150 });
    assert.equal(status.code, grpc.status.DEADLINE_EXCEEDED);
    await untilIdle();
    return `${grpc.status[status.code]} after ${messages.length} messages, the session is free`;
  },

  async "error details"() {
    const { status } = await generate({ text: "Count:", sampling: { temperature: -1 } });
    assert.equal(status.code, grpc.status.INVALID_ARGUMENT);
    const found = detailsOf(status);
    const [violation] = found["google.rpc.BadRequest"].fieldViolations;
    assert.equal(violation.field, "temperature");
    assert.equal(found["google.rpc.ErrorInfo"].domain, "specdec.v1");
    return `BadRequest names ${violation.field}: ${violation.description}`;
  },
};

(async () => {
  for (const [name, check] of Object.entries(checks)) console.log(`ok  ${name}: ${await check()}`);
  process.exit(0);
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
