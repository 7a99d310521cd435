package policy

import (
	"bytes"
	"embed"
	"errors"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/relais-mta/relais/shared/fault"
)

//go:embed defaults/*.toml
var defaults embed.FS

// sections lists the sections in the order in which they are shown.
var sections = [...]struct {
	name string
	of   func(*Document) any // pointer to the section's struct
}{
	{"submission", func(d *Document) any { return &d.Submission }},
	{"inbound", func(d *Document) any { return &d.Inbound }},
	{"queue", func(d *Document) any { return &d.Queue }},
	{"delivery", func(d *Document) any { return &d.Delivery }},
	{"storage", func(d *Document) any { return &d.Storage }},
	{"streams", func(d *Document) any { return &d.Streams }},
	{"pools", func(d *Document) any { return &d.Pools }},
	{"providers", func(d *Document) any { return &d.Providers }},
	{"feedback", func(d *Document) any { return &d.Feedback }},
	{"limits", func(d *Document) any { return &d.Limits }},
	{"warmup", func(d *Document) any { return &d.Warmup }},
}

// SectionNames returns the names of the document's sections.
func SectionNames() []string {
	names := make([]string, len(sections))
	for i, s := range sections {
		names[i] = s.name
	}
	return names
}

// DefaultSection returns the shipped TOML text of a section, whose comments
// explain every key, or "" for a name that is no section.
func DefaultSection(name string) string {
	text, err := defaults.ReadFile("defaults/" + name + ".toml")
	if err != nil {
		return ""
	}
	return string(text)
}

// Parse returns the shipped defaults overlaid by the given sections: a key
// that a section states replaces the default, a list as a whole. The result
// is valid. Errors are fault.Invalid (fault.TooLarge for a section over
// MaxSectionBytes) and name the section, the key, the line where one is known,
// and the fix.
func Parse(texts map[string]string) (Document, error) {
	const op = "policy.Parse"
	var doc Document
	var p problems
	for _, s := range sections {
		if err := decode(s.name, DefaultSection(s.name), s.of(&doc), &p); err != nil {
			return Document{}, err
		}
	}
	if err := p.err(op); err != nil {
		return Document{}, fault.Wrap(err, fault.Internal, op, "the shipped policy cannot be read")
	}
	plans := doc.Warmup.Plan
	for _, s := range sections {
		if err := decode(s.name, texts[s.name], s.of(&doc), &p); err != nil {
			return Document{}, err
		}
	}
	doc.Warmup.keepShipped(plans)
	for _, name := range sortedKeys(texts) {
		if !slices.Contains(SectionNames(), name) {
			p.add(clip(name), "is not a section of the policy; the sections are %s", quoteAll(SectionNames()))
		}
	}
	if err := p.err(op); err != nil {
		return Document{}, err
	}
	if err := doc.Validate(); err != nil {
		return Document{}, err
	}
	return doc, nil
}

// decode overlays one section's text on the struct that into points to.
func decode(section, text string, into any, p *problems) error {
	if len(text) > MaxSectionBytes {
		return &fault.Error{Kind: fault.TooLarge, Op: "policy.Parse", Field: section,
			Public: "the section has " + strconv.Itoa(len(text)) + " bytes, allowed are " + strconv.Itoa(MaxSectionBytes) + "; shorten it"}
	}
	if text == "" {
		return nil
	}
	var stated map[string]any
	if err := toml.Unmarshal([]byte(text), &stated); err != nil {
		explain(section, into, err, p)
		return nil
	}
	target := reflect.ValueOf(into).Elem()
	for name, f := range tagged(target.Type()) {
		// A list is replaced as a whole; the decoder would append to it.
		if _, ok := stated[name]; ok && f.Type.Kind() == reflect.Slice {
			target.FieldByIndex(f.Index).SetZero()
		}
	}
	bareNumbers(section, target.Type(), stated, p)
	d := toml.NewDecoder(bytes.NewReader([]byte(text)))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		explain(section, into, err, p)
	}
	return nil
}

// tagged returns the fields of a struct by their TOML names, those of an
// embedded struct included.
func tagged(t reflect.Type) map[string]reflect.StructField {
	fields := make(map[string]reflect.StructField)
	for _, f := range reflect.VisibleFields(t) {
		if name := f.Tag.Get("toml"); name != "" {
			fields[name] = f
		}
	}
	return fields
}

// bareNumbers reports durations written as numbers: the decoder would take
// them for nanoseconds.
func bareNumbers(field string, t reflect.Type, v any, p *problems) {
	switch v := v.(type) {
	case int64:
		if t == reflect.TypeFor[Duration]() && v != 0 {
			p.add(field, "is the bare number %d, write a duration with its unit, such as \"%ds\"", v, v)
		}
	case []any:
		for i, e := range v {
			if t.Kind() == reflect.Slice {
				bareNumbers(field+"["+strconv.Itoa(i)+"]", t.Elem(), e, p)
			}
		}
	case map[string]any:
		if t.Kind() != reflect.Struct {
			return
		}
		fields := tagged(t)
		for _, name := range sortedKeys(v) {
			if f, ok := fields[name]; ok {
				bareNumbers(field+"."+name, f.Type, v[name], p)
			}
		}
	}
}

// explain turns the decoder's errors into problems that name section, key,
// line and the fix.
func explain(section string, into any, err error, p *problems) {
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) {
		for i := range missing.Errors {
			e := &missing.Errors[i]
			line, _ := e.Position()
			p.add(fieldName(section, e.Key()), "line %d: there is no such key; %s", line, knownKeys(reflect.TypeOf(into).Elem(), e.Key()))
		}
		return
	}
	var de *toml.DecodeError
	if !errors.As(err, &de) {
		p.add(section, "is not TOML that can be read; see the shipped section for its form")
		return
	}
	line, _ := de.Position()
	field := fieldName(section, de.Key())
	what := strings.TrimPrefix(de.Error(), "toml: ")
	if ours, ok := strings.CutPrefix(what, durationOp+": "); ok {
		p.add(field, "line %d: %s", line, ours)
		return
	}
	if t := typeAt(reflect.TypeOf(into).Elem(), de.Key()); t != nil && strings.HasPrefix(what, "cannot decode") {
		p.add(field, "line %d: has the wrong type, write %s", line, form(t))
		return
	}
	p.add(field, "line %d: is not valid TOML: %s", line, clip(what))
}

func fieldName(section string, key toml.Key) string {
	if len(key) == 0 {
		return section
	}
	return section + "." + clip(strings.Join(key, "."))
}

// typeAt returns the type of the field a key leads to, or nil.
func typeAt(t reflect.Type, key toml.Key) reflect.Type {
	for _, part := range key {
		for t.Kind() == reflect.Slice {
			t = t.Elem()
		}
		switch t.Kind() {
		case reflect.Struct:
			f, ok := tagged(t)[part]
			if !ok {
				return nil
			}
			t = f.Type
		case reflect.Map:
			t = t.Elem()
		default:
			return nil
		}
	}
	return t
}

// knownKeys names the keys that could stand where key stands.
func knownKeys(t reflect.Type, key toml.Key) string {
	for n := len(key) - 1; n >= 0; n-- {
		at := typeAt(t, key[:n])
		for at != nil && at.Kind() == reflect.Slice {
			at = at.Elem()
		}
		if at != nil && at.Kind() == reflect.Struct {
			return "known here are " + strings.Join(sortedKeys(tagged(at)), ", ")
		}
	}
	return "remove it"
}

// form says how a value of the type is written.
func form(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[Duration]():
		return "a duration such as \"5m\""
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct:
		return "[[…]] tables"
	case t == reflect.TypeFor[[]Duration]():
		return "a list of durations such as [\"5m\", \"10m\"]"
	case t.Kind() == reflect.Slice:
		return "a list such as [\"one\", \"two\"]"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.String:
		return "text in quotes"
	case t.Kind() == reflect.Map || t.Kind() == reflect.Struct:
		return "a table"
	}
	return "a whole number"
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
