// submit.js: sends two mails with Nodemailer, one over STARTTLS and one over
// TLS, and one that must be refused. Arguments: the folder of node_modules, a
// file with the CA, host, both ports, user, password, sender, recipient.
const [modules, ca, host, starttls, tls, user, pass, from, to] = process.argv.slice(2);
const nodemailer = require(modules + "/nodemailer");
const fs = require("fs");

async function main() {
  for (const [port, secure] of [[starttls, false], [tls, true]]) {
    const transport = nodemailer.createTransport({
      host, port: Number(port), secure, requireTLS: true, auth: { user, pass }, tls: { ca: fs.readFileSync(ca) }, pool: true,
    });
    const sent = await transport.sendMail({
      from: `"Nöde" <${from}>`, to, subject: "Größe " + port, headers: { "X-Case": "nodemailer " + port },
      text: "Liebe Grüße\n.\n..\nfin\n", html: "<p>été</p>", attachments: [{ filename: "ünï.bin", content: Buffer.from([0, 1, 13, 10, 46, 255]) }],
    });
    console.log(sent.response);
    try {
      await transport.sendMail({ from: "somebody@other.test", to, subject: "x", text: "x" });
      console.log("not refused");
    } catch (e) {
      console.log("refused", e.responseCode);
    }
    transport.close();
  }
}

main().catch((e) => {
  console.error(e);
  process.exit(1);
});
