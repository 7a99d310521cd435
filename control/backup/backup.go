// Package backup writes the replicated state of a cluster to one encrypted file
// and reads it back. A backup that cannot be restored is worse than none, so
// none is called good before it was restored into a scratch state whose hash is
// the one it was taken from.
//
// A file is
//
//	"RELAISBK" | format u16 | length u32 | manifest, JSON | salt [16]
//	chunks: (last u1, length u31) | AES-256-GCM ciphertext and tag
//	SHA-256 of everything before
//
// in big-endian order. The manifest is in clear, so that a file can be told
// apart without any key. The key of the chunks is derived from the cluster's
// key-encryption key (KEK), the salt and the manifest: a changed manifest opens
// nothing. A chunk's nonce is its number and whether it is the last, so chunks
// cannot be moved, repeated or left out. The manifest carries the KEK sealed
// under the recovery key: file and recovery key together restore a cluster of
// which nothing else is left.
package backup

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"github.com/relais-mta/relais/control/command"
	"github.com/relais-mta/relais/control/state"
	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/ids"
	"github.com/relais-mta/relais/shared/pki"
)

const (
	magic            = "RELAISBK"
	fileFormat       = 1
	maxManifestBytes = 64 << 10
	saltBytes        = 16
	chunkBytes       = 64 << 10
	tagBytes         = 16
	lastChunk        = 1 << 31
	nonceBytes       = 12
	maxStateBytes    = 16 << 30
)

// Manifest says what a backup holds. Nothing in it is a secret by itself.
type Manifest struct {
	Cluster        ids.Cluster `json:"cluster"`
	Generation     uint64      `json:"generation"`
	Index          uint64      `json:"index"`      // of the last log entry in it
	StateHash      string      `json:"state_hash"` // 64 hexadecimal digits
	StateBytes     int64       `json:"state_bytes"`
	KEKID          string      `json:"kek_id"`
	RecoverySealed []byte      `json:"recovery_sealed"` // the KEK, under the recovery key
	FSMVersion     uint16      `json:"fsm_version"`     // a program restoring it must know at least this version of the commands
	Version        string      `json:"version"`         // of the program that wrote it
	CreatedAt      time.Time   `json:"created_at"`
}

// Write writes a backup of the reader's moment. version is the program's.
func Write(w io.Writer, r *state.Reader, kek pki.Key, version string, now time.Time) (Manifest, error) {
	const op = "backup.Write"
	c := r.Cluster()
	if c == nil {
		return Manifest{}, fault.New(fault.Unavailable, op, "the cluster is not initialised: there is nothing to back up")
	}
	if id := pki.NewSealer(kek).KeyID(); id != c.KEKID {
		return Manifest{}, fault.New(fault.Invalid, op, "this server holds key-encryption key %s, the cluster uses %s: restore the file kek.key", id, c.KEKID)
	}
	size, err := r.WriteTo(io.Discard) // rows of one moment have one length
	if err != nil {
		return Manifest{}, err
	}
	sum := r.Hash()
	m := Manifest{Cluster: c.ID, Generation: c.Generation, Index: r.Index(), StateHash: hex.EncodeToString(sum[:]), StateBytes: size,
		KEKID: c.KEKID, RecoverySealed: c.RecoverySealed, FSMVersion: c.FSMVersion, Version: version, CreatedAt: now.UTC().Truncate(time.Second)}
	text, err := json.Marshal(m)
	if err != nil || len(text) > maxManifestBytes {
		return Manifest{}, fault.Wrap(errors.Join(err, fmt.Errorf("%d bytes", len(text))), fault.Internal, op, "the manifest cannot be written")
	}
	digest := sha256.New()
	out := io.MultiWriter(w, digest)
	head := append([]byte(magic), byte(fileFormat>>8), byte(fileFormat))
	head = binary.BigEndian.AppendUint32(head, uint32(len(text)))
	head = append(head, text...)
	salt := make([]byte, saltBytes)
	_, _ = rand.Read(salt) // documented never to return an error
	head = append(head, salt...)
	if _, err := out.Write(head); err != nil {
		return Manifest{}, unwritable(err)
	}
	chunks := &chunkWriter{w: out, aead: fileCipher(kek, head)}
	if _, err := r.WriteTo(chunks); err != nil {
		return Manifest{}, unwritable(err)
	}
	if err := chunks.close(); err != nil {
		return Manifest{}, unwritable(err)
	}
	_, err = w.Write(digest.Sum(nil))
	return m, unwritable(err)
}

func unwritable(err error) error {
	return fault.Wrap(err, fault.Internal, "backup.Write", "the backup cannot be written: is there space left?")
}

// fileCipher returns the cipher of one file: head is everything before the
// chunks, the salt included.
func fileCipher(kek pki.Key, head []byte) cipher.AEAD {
	sum := sha256.Sum256(head)
	key := kek.Derive("relais backup v1\x00" + string(sum[:]))
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic("backup: AES refuses a 32-byte key: " + err.Error())
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("backup: GCM refuses AES: " + err.Error())
	}
	return aead
}

// nonce is unique under a file's key: 7 bytes of zeros, the number of the
// chunk, and whether it is the last.
func nonce(number uint32, last bool) []byte {
	n := make([]byte, nonceBytes)
	binary.BigEndian.PutUint32(n[7:], number)
	if last {
		n[11] = 1
	}
	return n
}

// chunkWriter encrypts what is written to it. It holds a full chunk back until
// it knows whether that is the last one.
type chunkWriter struct {
	w      io.Writer
	aead   cipher.AEAD
	buf    []byte
	number uint32
}

// Write implements io.Writer.
func (c *chunkWriter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if len(c.buf) == chunkBytes {
			if err := c.flush(false); err != nil {
				return 0, err
			}
		}
		k := min(len(p), chunkBytes-len(c.buf))
		c.buf = append(c.buf, p[:k]...)
		p = p[k:]
	}
	return n, nil
}

func (c *chunkWriter) close() error { return c.flush(true) }

func (c *chunkWriter) flush(last bool) error {
	length := uint32(len(c.buf) + tagBytes)
	if last {
		length |= lastChunk
	}
	out := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(c.buf)+tagBytes), length)
	out = c.aead.Seal(out, nonce(c.number, last), c.buf, nil)
	c.number++
	c.buf = c.buf[:0]
	_, err := c.w.Write(out)
	return err
}

// Archive is a backup being read. Use Open.
type Archive struct {
	Manifest Manifest

	r      io.Reader // hashes what it reads
	raw    io.Reader
	digest hash.Hash
	head   []byte
}

// Open reads the manifest. The rest is checked while it is read.
func Open(r io.Reader) (*Archive, error) {
	const op = "backup.Open"
	a := &Archive{raw: r, digest: sha256.New()}
	a.r = io.TeeReader(r, a.digest)
	a.head = make([]byte, len(magic)+2+4)
	if _, err := io.ReadFull(a.r, a.head); err != nil || string(a.head[:len(magic)]) != magic {
		return nil, fault.Field(op, "file", "it is not a backup of a control plane")
	}
	if v := binary.BigEndian.Uint16(a.head[len(magic):]); v != fileFormat {
		return nil, fault.Field(op, "file", "the backup has format %d, this program reads %d: use the release that wrote it, or a newer one", v, fileFormat)
	}
	length := binary.BigEndian.Uint32(a.head[len(magic)+2:])
	if length > maxManifestBytes {
		return nil, damaged(fmt.Errorf("a manifest of %d bytes", length))
	}
	rest := make([]byte, int(length)+saltBytes)
	if _, err := io.ReadFull(a.r, rest); err != nil {
		return nil, damaged(err)
	}
	a.head = append(a.head, rest...)
	if err := json.Unmarshal(rest[:length], &a.Manifest); err != nil {
		return nil, damaged(err)
	}
	if a.Manifest.Cluster.IsZero() || a.Manifest.StateBytes < 0 || a.Manifest.StateBytes > maxStateBytes {
		return nil, damaged(errors.New("a manifest without a cluster or a size"))
	}
	if v := a.Manifest.FSMVersion; v > command.FSMVersion {
		return nil, fault.Field(op, "file", "the backup is of a cluster that works at version %d of the commands, this program (%s wrote it) knows %d: install a newer release", v, a.Manifest.Version, command.FSMVersion)
	}
	return a, nil
}

func damaged(cause error) error {
	return &fault.Error{Kind: fault.Invalid, Op: "backup.Open", Field: "file", Public: "the backup is damaged or cut short: use another one", Cause: cause}
}

// CheckSum reads the rest of the archive and compares its checksum, which needs
// no key. It finds damage, not forgery.
func (a *Archive) CheckSum() error {
	var head [4]byte
	for {
		if _, err := io.ReadFull(a.r, head[:]); err != nil {
			return damaged(err)
		}
		length := binary.BigEndian.Uint32(head[:])
		if _, err := io.CopyN(io.Discard, a.r, int64(length&^lastChunk)); err != nil {
			return damaged(err)
		}
		if length&lastChunk != 0 {
			return a.trailer()
		}
	}
}

// trailer compares the checksum, after the last chunk.
func (a *Archive) trailer() error {
	want := a.digest.Sum(nil)
	got := make([]byte, len(want)+1)
	if n, err := io.ReadFull(a.raw, got); n != len(want) || !errors.Is(err, io.ErrUnexpectedEOF) || string(got[:n]) != string(want) {
		return damaged(errors.New("the checksum at its end does not match"))
	}
	return nil
}

// Restore reads the rest of the archive into a scratch state and compares hash
// and index with the manifest's. The state it returns is whole.
func (a *Archive) Restore(kek pki.Key) (*state.Store, error) {
	const op = "backup.Restore"
	if id := pki.NewSealer(kek).KeyID(); id != a.Manifest.KEKID {
		return nil, fault.New(fault.Denied, op, "the backup opens with key-encryption key %s, this is %s: name the key file of that cluster, or its recovery key", a.Manifest.KEKID, id)
	}
	plain := &chunkReader{a: a, aead: fileCipher(kek, a.head)}
	st := state.New()
	if err := st.Restore(plain); err != nil {
		if plain.err != nil && !errors.Is(plain.err, io.EOF) {
			return nil, plain.err
		}
		return nil, err
	}
	// Whatever follows the state, and the checksum.
	if n, err := io.Copy(io.Discard, plain); err != nil || n != 0 {
		return nil, damaged(errors.Join(err, fmt.Errorf("%d bytes behind the state", n)))
	}
	r := st.Read()
	c := r.Cluster()
	sum := r.Hash()
	if c == nil || c.ID != a.Manifest.Cluster || c.Generation != a.Manifest.Generation || r.Index() != a.Manifest.Index || hex.EncodeToString(sum[:]) != a.Manifest.StateHash {
		return nil, damaged(errors.New("the state in it is not the one its manifest describes"))
	}
	return st, nil
}

// chunkReader decrypts.
type chunkReader struct {
	a      *Archive
	aead   cipher.AEAD
	buf    []byte
	number uint32
	done   bool
	err    error
}

// Read implements io.Reader.
func (c *chunkReader) Read(p []byte) (int, error) {
	for len(c.buf) == 0 {
		if c.err == nil {
			c.err = c.next()
		}
		if c.err != nil {
			return 0, c.err
		}
	}
	n := copy(p, c.buf)
	c.buf = c.buf[n:]
	return n, nil
}

func (c *chunkReader) next() error {
	if c.done {
		if err := c.a.trailer(); err != nil {
			return err
		}
		return io.EOF
	}
	var head [4]byte
	if _, err := io.ReadFull(c.a.r, head[:]); err != nil {
		return damaged(err)
	}
	length := binary.BigEndian.Uint32(head[:])
	last := length&lastChunk != 0
	length &^= lastChunk
	if length < tagBytes || length > chunkBytes+tagBytes {
		return damaged(fmt.Errorf("a chunk of %d bytes", length))
	}
	sealed := make([]byte, length)
	if _, err := io.ReadFull(c.a.r, sealed); err != nil {
		return damaged(err)
	}
	plain, err := c.aead.Open(sealed[:0], nonce(c.number, last), sealed, nil)
	if err != nil {
		return damaged(err)
	}
	c.number++
	c.buf, c.done = plain, last
	return nil
}
