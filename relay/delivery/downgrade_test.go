package delivery

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/emersion/go-message"
	_ "github.com/emersion/go-message/charset"
)

const plain8 = "From: a@sender.example\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\nSubject: x\r\n\r\n" +
	"caf\xc3\xa9 = coffee \r\n.\r\nFrom here\r\n" + "long \xc3\xa9 "

// contents decodes a message into its leaf parts, by an independent reader.
func contents(t *testing.T, raw []byte) []string {
	t.Helper()
	e, err := message.Read(bytes.NewReader(raw))
	if e == nil {
		t.Fatalf("not readable: %v", err)
	}
	var out []string
	err = e.Walk(func(path []int, e *message.Entity, err error) error {
		if e == nil {
			return err
		}
		kind, _, _ := e.Header.ContentType()
		if strings.HasPrefix(kind, "multipart/") {
			return nil
		}
		b, rerr := io.ReadAll(e.Body)
		if rerr != nil {
			return rerr
		}
		if kind == "message/rfc822" {
			out = append(out, contents(t, b)...)
			return nil
		}
		out = append(out, fmt.Sprintf("%v %s %q", path, kind, b))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestDowngradeKeepsContents(t *testing.T) {
	long := plain8 + strings.Repeat("\xc3\xa9tude ", 200) + "\r\n"
	multi := "MIME-Version: 1.0\r\nContent-Type: multipart/mixed;\r\n boundary=\"b=1\"\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" +
		"pr\xc3\xa9amble\r\n--b=1\r\nContent-Type: text/html; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n<p>\xc3\xa9</p>\r\n\r\n" +
		"--b=1\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary\r\n\r\n\x80\x81\xff" + strings.Repeat("\xfe", 200) +
		"\r\n--b=1\r\nContent-Type: text/plain\r\n\r\nseven\r\n--b=1 \r\n\r\nno header\r\n" +
		"--b=1\r\nContent-Type: message/rfc822\r\nContent-Transfer-Encoding: 8bit\r\n\r\nSubject: inner\r\nContent-Type: text/plain; charset=utf-8\r\n\r\ninner \xc3\xa9\r\n" +
		"--b=1--\r\n\xc3\xa9pilogue\r\n"
	nested := "MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=o\r\n\r\n--o\r\nContent-Type: multipart/alternative; boundary=oo\r\n\r\n" +
		"--oo\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n\xc3\xa9\r\n--oo--\r\n--o--\r\n"
	for name, in := range map[string]string{"plain": plain8 + "\r\n", "no end of line": plain8, "long": long, "multipart": multi, "nested": nested} {
		t.Run(name, func(t *testing.T) {
			out, err := downgrade(&Content{Reader: strings.NewReader(in), Length: int64(len(in))}, false)
			if err != nil {
				t.Fatal(err)
			}
			if !sevenBit(out) {
				t.Errorf("octets above 127 are left in %q", out)
			}
			if _, err := stuffed(out); err != nil {
				t.Error(err)
			}
			for line := range strings.SplitSeq(string(out), "\r\n") {
				if len(line) > 998 {
					t.Errorf("a line of %d octets", len(line))
				}
			}
			if want, got := contents(t, []byte(in)), contents(t, out); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("contents\n%s, want\n%s\nof %s", got, want, out)
			}
			again, err := downgrade(&Content{Bytes: out}, false)
			if err != nil || !bytes.Equal(again, out) {
				t.Errorf("a second conversion changes it: %v", err)
			}
		})
	}
}

func TestDowngradeOfPlainMail(t *testing.T) {
	out, err := downgrade(&Content{Bytes: []byte("Subject: x\r\n\r\n\xe9\r\n")}, false)
	want := "Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=unknown-8bit\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=E9\r\n"
	if err != nil || string(out) != want {
		t.Errorf("%q, %v, want %q", out, err, want)
	}
}

func TestDowngradeRefuses(t *testing.T) {
	deep := "Content-Type: message/rfc822\r\n\r\n"
	for name, in := range map[string]string{
		"8-bit header":     "Subject: \xc3\xa9\r\n\r\n\xc3\xa9\r\n",
		"8-bit part field": "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Disposition: attachment; filename=\xc3\xa9\r\n\r\n\xe9\r\n--b--\r\n",
		"signed":           "Content-Type: multipart/signed; boundary=b\r\n\r\n--b\r\n\r\n\xe9\r\n--b--\r\n",
		"no boundary":      "Content-Type: multipart/mixed\r\n\r\n\xe9\r\n",
		"false encoding":   "Content-Transfer-Encoding: base64\r\n\r\n\xe9\r\n",
		"message type":     "Content-Type: message/global\r\n\r\n\xe9\r\n",
		"depth":            strings.Repeat(deep, maxMIMEDepth+2) + "\r\n\xe9\r\n",
		"parts":            "Content-Type: multipart/mixed; boundary=b\r\n\r\n" + strings.Repeat("--b\r\n\r\nx\r\n", maxMIMEParts+1) + "--b\r\n\r\n\xe9\r\n--b--\r\n",
	} {
		if out, err := downgrade(&Content{Bytes: []byte(in)}, false); err == nil {
			t.Errorf("%s: became %.200q", name, out)
		}
	}
	if _, err := downgrade(&Content{Bytes: []byte("\r\n\xe9")}, true); err == nil {
		t.Error("a signed message was converted")
	}
}

func TestDowngradeInTransaction(t *testing.T) {
	p := &peer{extensions: []string{"PIPELINING", "SIZE"}}
	_, s := dialPeer(t, p)
	tx := transaction(1)
	tx.Content.Bytes, tx.EightBit = []byte(plain8+"\r\n"), true
	var signed []byte
	tx.Sign = func(converted []byte) ([]byte, error) {
		signed = bytes.Clone(converted)
		return []byte("X-Signed: yes\r\n"), nil
	}
	if got := brief(s.Send(tx)); got != "delivered/final-dot/250/2.0.0" {
		t.Fatal(got)
	}
	commands, messages := p.got()
	if want := fmt.Sprintf("MAIL FROM:<b+1@bounce.sender.example> SIZE=%d", len(signed)); commands[1] != want {
		t.Errorf("%q, want %q", commands[1], want)
	}
	if got := unstuff(messages[0]); string(got) != "X-Signed: yes\r\n"+string(signed) || !sevenBit(got) || len(signed) == 0 {
		t.Errorf("sent %q, signed %q", got, signed)
	}
	tx = transaction(1)
	tx.Content.Bytes, tx.EightBit, tx.ClientDKIM = []byte(plain8+"\r\n"), true, true
	if got := brief(s.Send(tx)); got != "failed/local/5.6.3" || s.Dead() {
		t.Errorf("signed by the client: %s", got)
	}
}

func FuzzDowngrade(f *testing.F) {
	for _, s := range []string{plain8, "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\n\xe9\r\n--b--\r\n", "\r\n\xff", "\xff", "a:b\r\n c\r\n\r\n\x80"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if _, err := stuffed(in); err != nil {
			return // acceptance refuses it
		}
		out, err := downgrade(&Content{Bytes: in}, false)
		if err != nil {
			return
		}
		if !sevenBit(out) {
			t.Fatalf("%q became %q", in, out)
		}
		if _, err := stuffed(out); err != nil {
			t.Fatalf("%q became %q: %v", in, out, err)
		}
		if sevenBit(in) && !bytes.Equal(in, out) {
			t.Fatalf("7-bit %q became %q", in, out)
		}
	})
}
