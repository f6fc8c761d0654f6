"""The words that signs show.

No word is made of letters alone whose capitals look like their small forms ("cow"): its case could not be read.
"""

from __future__ import annotations

WORDS = tuple(
    """
    able acid actor adult after agent album alley amber angel anger ankle apple april apron arch area arena arm army
    arrow atlas attic aunt author autumn baby back badge bag baker bakery ball banana band bank barn base basket bath
    beach beam bean bear beard bed bee bell belt bench berry bike bird black blade blanket blue board boat body bone
    book border bottle bowl box boy brain branch brave bread brick bridge broom brother brush bucket bus butter button
    cabin cable cactus cake camel camera camp canal candle candy captain car card carpet carrot castle cat cave cedar
    chair chalk cheese cherry chess chicken child circus city clay clean clear clock cloud clown coach coast coat
    coffee coin cold comet cookie copper coral corner cotton country crab crane cream crown cup curtain dance dawn
    day deer desert desk diamond dinner doctor dog doll door dragon drawer dream dress drum duck dust eagle ear earth
    east easy echo egg eight elbow engine evening exit eye face factory fairy family farm feather fence ferry field
    fig film finger fire fish five flag flame flower flute fly fog forest fork fossil fox free frog fruit game garden
    gate ghost giant ginger girl glass globe glove goat gold grape grass green guitar gym hair hall hammer hand happy
    harbour hat hen hero hill home honey horse hotel hour house ice ink iron island ivory jacket jam jar jelly jet
    jewel joke judge juice jump jungle kettle key king kitchen kite kitten knee knife ladder lake lamp lantern leaf
    leather lemon letter light lily lion lizard lobby log lunch magnet map maple market mask meadow melon metal milk
    mint mirror money monkey moon morning mother motor mouse museum music nail name napkin needle nest net night nine
    noise north nurse nut oak ocean office oil olive onion open orange orchard oven page paint palace panda paper
    parade park parrot party path peach pear pearl pen pencil pepper piano picture pie pig pillow pilot pine pirate
    planet plant plate plum pocket poem police pond pony pool potato prince prize pump puppy purple puzzle quartz
    queen quick quiet rabbit radio rail rain red ribbon rice ring river road robin robot rocket roof room rope
    rose ruby sail salad salt sand school sea season seed seven shadow sheep shell ship shirt shoe shop silk silver
    singer sister skirt sky smile snail snake soap sofa soup south spider spoon spring square squid stable stage star
    station steam stone storm story straw street sugar summer sun sweet table tail taxi tea teacher temple tent
    theatre thunder ticket tiger time toast tomato tooth tower town toy train tree truck tulip tunnel turtle uncle
    valley vase velvet village violin wagon wall walnut water wave whale wheat wheel whistle white wind window winter
    wolf wood word world yard yellow young zebra zero
    """.split()  # noqa: SIM905 - a page of words is easier to read and to mend than 470 strings
)
HELD_OUT_WORDS = tuple(word for index, word in enumerate(WORDS) if index % 20 in (3, 10, 17))
TRAIN_WORDS = tuple(word for index, word in enumerate(WORDS) if index % 20 not in (3, 10, 17))
